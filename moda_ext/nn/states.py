"""What decoding remembers between two calls. Public in ``moda_ext.alignment`` and ``moda_ext.attention``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from moda_ext._ops.limits import accumulation_dtype
from moda_ext.functional.alignment import modality_gram
from moda_ext.functional.attention import as_int32

__all__ = ["AttentionState", "GramState"]


@dataclasses.dataclass(eq=False)
class GramState:
    r"""The causal Gram between two calls: the sums over all tokens seen, in a form that can go back a little.

    .. math:: G^m_{\le i} = \text{gram}^m + \sum_{j \text{ recent},\ a_j = m} \phi(k_j)^\top \phi(k_j)

    Old tokens are in ``gram``; the last ``window`` ones are kept as keys and are added where the Gram is used. So the
    last tokens can be taken back (:meth:`crop`, for speculative decoding) exactly: a sum of floating-point numbers
    cannot be subtracted from, but a token that was never added can be dropped. Every method returns a new state and
    leaves this one as it is. A pytree, so ``torch.compile`` and ``torch.export`` take it; ``torch.save`` and
    ``torch.load`` take it too. Source: MODA (arXiv 2507.04635), Eq. 5, over the tokens so far.

    Attributes:
        gram: (B, Hkv, M, D, D), raw sums in float32 or float64.
        key: (B, Hkv, T, D), the recent keys, T <= ``window``, in their own dtype.
        modality: (B, T), their modalities, int32, -1 for padding.
        length: number of tokens that went in, with padding.
        key_norm: phi of :func:`moda_ext.alignment.modality_gram`.
        window: how many recent tokens are kept. None marks a fixed Gram (``scope="context"``), which :meth:`append` and
            :meth:`crop` leave as it is.

    Example:
        >>> key, modality = torch.randn(1, 2, 100, 8), torch.zeros(1, 100, dtype=torch.int32)
        >>> state = GramState.from_keys(key, modality, num_modalities=2)
        >>> state.gram.shape, state.key.shape, state.crop(90).length
        (torch.Size([1, 2, 2, 8, 8]), torch.Size([1, 2, 64, 8]), 90)
    """

    gram: Tensor
    key: Tensor
    modality: Tensor
    length: int
    key_norm: str | None = "l2"
    window: int | None = 64

    @classmethod
    def from_keys(
        cls,
        key: Tensor,
        modality: Tensor,
        num_modalities: int = 2,
        *,
        include: Tensor | None = None,
        key_norm: str | None = "l2",
        window: int | None = 64,
    ) -> GramState:
        """The state after the tokens with these keys: (B, Hkv, N, D), modality (B, N). N may be 0.

        With ``window=None`` a fixed Gram, over the tokens where ``include`` (B, N), a boolean tensor, holds.

        Raises:
            ValueError: a negative window, ``include`` without ``window=None``, or what ``modality_gram`` refuses.
        """
        if window is None:
            gram = modality_gram(key, modality, num_modalities, include=include, key_norm=key_norm, normalize=None)
            return cls(gram, key[:, :, :0], modality[:, :0].to(torch.int32), key.shape[2], key_norm, None)
        if window < 0:
            raise ValueError(f"GramState: window must be at least 0 or None, got {window}")
        if include is not None:
            raise ValueError("GramState: include belongs to a fixed Gram, window=None")
        batch, kv_heads, _, head_dim = key.shape
        shape = batch, kv_heads, num_modalities, head_dim, head_dim
        gram = torch.zeros(shape, dtype=accumulation_dtype(key.dtype), device=key.device)
        empty = cls(gram, key[:, :, :0], modality[:, :0].to(torch.int32), 0, key_norm, window)
        return empty.append(key, modality)

    @property
    def trace(self) -> Tensor:
        """(B, Hkv, M): trace of ``gram``, the number of its tokens if keys have unit length."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)

    def append(self, key: Tensor, modality: Tensor) -> GramState:
        """The state after more tokens: key (B, Hkv, N, D), modality (B, N)."""
        if self.window is None:
            return self
        length = self.length + key.shape[2]
        key, modality = self.with_recent(key, modality)
        fold = max(key.shape[2] - self.window, 0)
        gram = self.gram
        if fold:
            old, old_modality = key[:, :, :fold], modality[:, :fold]
            num_modalities = gram.shape[2]
            gram = gram + modality_gram(old, old_modality, num_modalities, key_norm=self.key_norm, normalize=None)
            key, modality = key[:, :, fold:].clone(), modality[:, fold:].clone()  # a view would keep the old ones alive
        return GramState(gram, key, modality, length, self.key_norm, self.window)

    def with_recent(self, key: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and modalities behind the recent ones: what is to be added to ``gram``."""
        modality = as_int32(modality)
        return torch.cat([self.key, key], dim=2), torch.cat([self.modality, modality], dim=1)

    def reorder(self, beam_idx: Tensor) -> GramState:
        """The state of sequences ``beam_idx`` (new B,), integer: beam search, or a part of the batch."""
        return self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, length: int) -> GramState:
        """The state after the first ``length`` tokens only, exactly.

        Raises:
            ValueError: ``length`` is not in 0 to ``self.length``, or further back than the recent keys.
        """
        if self.window is None:
            return self
        if not 0 <= length <= self.length:
            raise ValueError(f"GramState: length must lie in 0 to {self.length}, got {length}")
        keep = self.key.shape[2] - (self.length - length)
        if keep < 0:
            raise ValueError(
                f"GramState: cannot crop to length {length}, only to {self.length - self.key.shape[2]} or more: older "
                f"tokens are summed up (window={self.window}). Rebuild the state with GramState.from_keys("
                f"key[:, :, :{length}], modality[:, :{length}], ...)"
            )
        cropped = self.key[:, :, :keep], self.modality[:, :keep]
        return GramState(self.gram, *cropped, length, self.key_norm, self.window)

    def to(self, device: torch.device | str) -> GramState:
        """The state on another device."""
        return self._map(lambda t: t.to(device))

    def detach(self) -> GramState:
        """The state without its history of gradients."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> GramState:
        tensors = function(self.gram), function(self.key), function(self.modality)
        return GramState(*tensors, self.length, self.key_norm, self.window)


def _flatten_state(state: GramState) -> tuple[list[Any], list[Any]]:
    return [state.gram, state.key, state.modality, state.length], [state.key_norm, state.window]


def _flatten_state_with_keys(state: GramState) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
    leaves, context = _flatten_state(state)
    names = ("gram", "key", "modality", "length")
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], context


pytree.register_pytree_node(
    GramState,
    _flatten_state,
    lambda leaves, context: GramState(*leaves, *context),
    flatten_with_keys_fn=_flatten_state_with_keys,
    serialized_type_name="moda_ext.alignment.GramState",
)
GramState.__module__ = "moda_ext.alignment"  # where it is public: files of torch.save name it
torch.serialization.add_safe_globals([GramState])


@dataclasses.dataclass(eq=False)
class AttentionState:
    """What :class:`ModularDuplexAttention` remembers between calls. ``AttentionState()`` is the state before any token.

    The layer's forward pass updates it in place; the methods here return a new state and leave this one as it is. A
    pytree, so ``torch.compile`` and ``torch.export`` take it; ``torch.save`` and ``torch.load`` take it too.

    Attributes:
        key, value: (B, Hkv, T, D), keys after RoPE, not aligned; None before the first token.
        modality: (B, T), int32, -1 for padding.
        gram: the aligner's :class:`moda_ext.alignment.GramState`, None without an aligner.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    modality: Tensor | None = None
    gram: GramState | None = None

    @property
    def length(self) -> int:
        """Number of tokens, with padding."""
        return 0 if self.key is None else self.key.shape[2]

    def _tokens(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``(key, value, modality)``, None before the first token."""
        if self.key is None or self.value is None or self.modality is None or self.key.shape[2] == 0:
            return None
        return self.key, self.value, self.modality

    def reorder(self, beam_idx: Tensor) -> AttentionState:
        """The state of sequences ``beam_idx`` (new B,), integer: beam search, or a part of the batch."""
        return self._map(lambda t: t.index_select(0, beam_idx.to(t.device)), lambda gram: gram.reorder(beam_idx))

    def crop(self, length: int) -> AttentionState:
        """The state after the first ``length`` tokens only. Any length: the keys are all here.

        A Gram of fixed context stays; cropping into the context takes a new state.

        Raises:
            ValueError: ``length`` is not in 0 to ``self.length``.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"AttentionState: length must lie in 0 to {self.length}, got {length}")

        def crop_gram(gram: GramState) -> GramState:
            if (
                gram.window is None
                or self.key is None
                or self.modality is None
                or length >= gram.length - gram.key.shape[2]
            ):
                return gram.crop(length)
            return GramState.from_keys(
                self.key[:, :, :length],
                self.modality[:, :length],
                gram.gram.shape[2],
                key_norm=gram.key_norm,
                window=gram.window,
            )

        return self._map(lambda t: t[:, :, :length] if t.dim() == 4 else t[:, :length], crop_gram)

    def to(self, device: torch.device | str) -> AttentionState:
        """The state on another device."""
        return self._map(lambda t: t.to(device), lambda gram: gram.to(device))

    def detach(self) -> AttentionState:
        """The state without its history of gradients."""
        return self._map(Tensor.detach, GramState.detach)

    def _map(
        self, function: Callable[[Tensor], Tensor], gram_function: Callable[[GramState], GramState]
    ) -> AttentionState:
        key, value, modality = (None if t is None else function(t) for t in (self.key, self.value, self.modality))
        return AttentionState(key, value, modality, None if self.gram is None else gram_function(self.gram))


torch.export.register_dataclass(AttentionState, serialized_type_name="moda_ext.attention.AttentionState")
AttentionState.__module__ = "moda_ext.attention"
torch.serialization.add_safe_globals([AttentionState])
