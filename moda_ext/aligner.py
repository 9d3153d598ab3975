"""Duplex attention alignment as a module, and its decoding state. Public in ``moda_ext.alignment``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from moda_ext import reference
from moda_ext._ops import autocast, autograd, checks
from moda_ext._ops.checks import KEY_NORMS, MAX_MODALITIES, MAX_RANK, accumulation_dtype
from moda_ext.alignment import (
    _last_contiguous,
    causal_gram_projection,
    duplex_query_views,
    gram_indicator,
    modality_gram,
    project_queries,
)

__all__ = ["DuplexAligner", "GramState"]


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
        modality = modality.to(torch.int32)
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

    def _map(self, function) -> GramState:
        tensors = function(self.gram), function(self.key), function(self.modality)
        return GramState(*tensors, self.length, self.key_norm, self.window)


def _flatten_state(state: GramState):
    return [state.gram, state.key, state.modality, state.length], [state.key_norm, state.window]


def _flatten_state_with_keys(state: GramState):
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
torch.serialization.add_safe_globals([GramState])

FUSIONS = ("concat", "add")
SCOPES = ("causal", "context", "full")
NORMALIZATIONS = ("trace", "frobenius", "row")  # in the order of csrc/cpu/kernels/gram_family_kernels.h


class DuplexAligner(nn.Module):
    r"""Duplex attention alignment: every key mapped into the spaces of the other modalities, as views of the query.

    A key of modality a becomes, with :math:`\hat G^m` the normalised Gram matrix of modality m,

    .. math::
        u_j = \sum_{m \ne a_j} k_j \hat G^m, \qquad
        k'_j = \begin{cases}
            k_j (I + A^1_a B^1_a) + u_j A^2_a B^2_a & \text{fusion="concat"} \\
            (k_j + r_a \odot u_j)(I + A^1_a B^1_a) & \text{fusion="add"}
        \end{cases}

    which, linear in k as it is, moves to the query: :math:`q_i \cdot k'_j = q_i^{(a_j)} \cdot k_j`. The result is one
    view of the query for every key modality, the 5-dimensional ``query`` of
    :func:`moda_ext.attention.modular_attention`; keys and the key cache stay as they are. B and r start at 0: a new
    aligner returns the query itself, bit for bit. The weights are shared by all heads. Source: MODA (arXiv 2507.04635),
    section 3.3, Eq. 5-6, Table 1(b) and 1(c).

    Args:
        head_dim: D.
        num_modalities: M, 1 to 16.
        fusion: ``"concat"`` (the best row of Table 1(c)) or ``"add"``.
        rank: r of A (M, D, r) and B (M, r, D), at least 1.
        scope: which tokens a Gram is made of:

            - ``"causal"``: for query i the tokens up to i, so nothing leaks from the future;
            - ``"context"``: those of the mask ``include`` (the prompt), for all queries and for all of decoding;
            - ``"full"``: all tokens (Eq. 5 as printed). Not for causal language models: the Gram holds the answer.
        key_norm: ``"l2"``, keys of unit length, or None, keys as they are.
        normalize: ``"trace"`` (the "+CoV" row of Table 1(b)), ``"frobenius"``, or ``"row"`` (not in causal scope).

    Raises:
        ValueError: an unknown option, or a size that does not fit.

    Example:
        >>> aligner = DuplexAligner(64)
        >>> query, key = torch.randn(1, 8, 6, 64), torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> views = aligner(query, key, modality, modality)
        >>> views.shape, torch.equal(views[0], query)
        (torch.Size([2, 1, 8, 6, 64]), True)
    """

    def __init__(
        self,
        head_dim: int,
        num_modalities: int = 2,
        *,
        fusion: str = "concat",
        rank: int = 16,
        scope: str = "causal",
        key_norm: str | None = "l2",
        normalize: str = "trace",
    ):
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"DuplexAligner: head_dim must be at least 1, got {head_dim}")
        if not 1 <= num_modalities <= MAX_MODALITIES:
            raise ValueError(f"DuplexAligner: num_modalities must lie in 1 to {MAX_MODALITIES}, got {num_modalities}")
        if rank < 1:
            raise ValueError(f"DuplexAligner: rank must be at least 1, got {rank}")
        for name, value, allowed in (
            ("fusion", fusion, FUSIONS),
            ("scope", scope, SCOPES),
            ("key_norm", key_norm, KEY_NORMS),
            ("normalize", normalize, NORMALIZATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"DuplexAligner: {name} must be one of {allowed}, got {value!r}")
        if scope == "causal" and normalize == "row":
            raise ValueError(
                "DuplexAligner: normalize='row' has no causal form (its norm is a vector for every query); "
                "use 'trace' or 'frobenius', or another scope"
            )
        self.head_dim, self.num_modalities = head_dim, num_modalities
        self.fusion, self.scope, self.key_norm, self.normalize = fusion, scope, key_norm, normalize
        self.a1 = nn.Parameter(torch.empty(num_modalities, head_dim, rank))
        self.b1 = nn.Parameter(torch.empty(num_modalities, rank, head_dim))
        if fusion == "concat":
            self.a2 = nn.Parameter(torch.empty(num_modalities, head_dim, rank))
            self.b2 = nn.Parameter(torch.empty(num_modalities, rank, head_dim))
        else:
            self.ratio = nn.Parameter(torch.empty(num_modalities, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the identity: A random, B and ratio 0."""
        for name, parameter in self.named_parameters():
            if name in ("a1", "a2"):
                nn.init.normal_(parameter, std=self.head_dim**-0.5)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query_modality: Tensor,
        key_modality: Tensor,
        state: GramState | None = None,
        *,
        include: Tensor | None = None,
        return_indicator: bool = False,
        return_state: bool = False,
        read: Callable | None = None,
    ):
        """The views of the query.

        Args:
            query: (B, Hq, Nq, D), float32, float64, bfloat16 or float16; D as the operators take it.
            key: (B, Hkv, Nk, D), dtype of ``query``, as attention sees them (after RoPE), without those that ``state``
                holds already. In causal scope query and key are the same new tokens (or Nq <= Nk, aligned at the bottom
                right).
            query_modality, key_modality: (B, Nq) and (B, Nk), integer, in [0, M), -1 for padding.
            state: the tokens before, from the call before. Not in full scope.
            include: (B, Nk), boolean: the context. In context scope, and there in the first call only.
            return_indicator: also return how much of a query lies in each modality's space, see
                :func:`moda_ext.alignment.gram_indicator`.
            return_state: also return the state for the call after this one.
            read: for the other methods: is called instead, and its result returned. Parameters are sure to be there in
                a forward pass only, where offloading and sharding bring them.

        Returns:
            ``views`` (M, B, Hq, Nq, D) in the dtype of ``query``, or the tuple ``(views[, indicator][, state])`` of
            what was asked for, with ``indicator`` (B, Hq, Nq, M) in float32 or float64. Differentiable in everything.

        Raises:
            ValueError: ``state`` or ``include`` in a scope that has none, or shapes that do not fit.
            TypeError, NotImplementedError: as :func:`moda_ext.alignment.duplex_query_views`.
        """
        self.check(query, key, state, include, return_state)
        if read is not None:
            return read()
        if self.scope == "causal":
            results = self._causal(query, key, query_modality, key_modality, state, return_indicator)
        else:
            if state is None:
                keywords = {"include": include, "key_norm": self.key_norm, "window": None}
                state = GramState.from_keys(key, key_modality, self.num_modalities, **keywords)
            results = self._fixed(query, reference.normalize_gram(state.gram, self.normalize), return_indicator)
        if return_state:
            results = (*results, self.state_after(key, key_modality, state))
        return results[0] if len(results) == 1 else results

    def state_after(self, key: Tensor, key_modality: Tensor, state: GramState | None = None) -> GramState:
        """The state after ``state`` and more tokens: key (B, Hkv, N, D), modality (B, N)."""
        if state is not None:
            return state.append(key, key_modality)
        return GramState.from_keys(key, key_modality, self.num_modalities, key_norm=self.key_norm)

    def align_keys(self, key: Tensor, modality: Tensor, include: Tensor | None = None) -> Tensor:
        """The other side of the same scores: the aligned keys k', for full and context scope.

        ``query @ align_keys(key, ...)`` equals the views times ``key``; the keys must then be aligned before they are
        cached. On the CPU, with ``fusion="concat"``, outside autocast and where no gradient is asked for
        (``torch.no_grad``), it is one fused operator, for two modalities several times as fast.

        Args:
            key: (B, Hkv, N, D).
            modality: (B, N), integer. Padding is left as it is.
            include: (B, N), boolean, in context scope.

        Returns:
            (B, Hkv, N, D) in the dtype of ``key``.

        Raises:
            ValueError: causal scope, where a key looks different to every query.
        """
        if self.scope == "causal":
            raise ValueError("DuplexAligner: align_keys has no causal form (a key would differ from query to query)")
        read = functools.partial(self._aligned, key, modality, include)
        return self(key, key, modality, modality, include=include, read=read)

    def _aligned(self, key: Tensor, modality: Tensor, include: Tensor | None) -> Tensor:
        options = self.key_norm, self.normalize, 1e-6
        checks.gram("DuplexAligner.align_keys", key, modality, self.num_modalities, include, *options)
        keywords = {"include": include, "key_norm": self.key_norm, "normalize": self.normalize}
        if self._aligns_in_one_step(key):
            return self._align_in_one_step(key, modality, include)
        gram = modality_gram(key, modality, self.num_modalities, **keywords)
        raised = torch.where((modality >= 0)[:, None, :, None], key.to(gram.dtype), 0.0)  # padding may hold anything
        down, up = self._factors(self._others(gram))
        # The products of all modalities in one, of which each key keeps those of its own.
        members = modality[..., None] == torch.arange(self.num_modalities, device=modality.device)
        low_rank = (raised @ down.movedim(0, 3).flatten(3)).unflatten(3, (self.num_modalities, -1))
        low_rank = torch.where(members[:, None, :, :, None], low_rank, 0.0)
        return (key + low_rank.flatten(3) @ up.flatten(0, 1)).to(key.dtype)

    def _aligns_in_one_step(self, key: Tensor) -> bool:
        """Whether the fused operator takes these keys."""
        if self.fusion != "concat" or self.a1.shape[-1] > MAX_RANK:
            return False
        casts = autocast.cast_tokens(key)[0] is not key  # which is for the products; the sum stays as accurate as key
        return not casts and autograd.runs_fused(key, *self.parameters())

    def _align_in_one_step(self, key: Tensor, modality: Tensor, include: Tensor | None) -> Tensor:
        weights, eps = (self.a1, self.b1, self.a2, self.b2), 1e-6
        checks.fuser("DuplexAligner.align_keys", key, self.num_modalities, *weights)
        return autograd.duplex_aligned_keys(
            _last_contiguous(key),
            modality.to(torch.int32),
            include,
            *(w.to(accumulation_dtype(key.dtype)).contiguous() for w in weights),
            self.num_modalities,
            self.key_norm == "l2",
            eps,
            NORMALIZATIONS.index(self.normalize),
        )

    def _factors(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """down (M, B, Hkv, D, R) and up (M, R, D): a key k of modality a becomes k + k down_a up_a."""
        a1, b1 = self.a1.to(others.dtype)[:, None, None], self.b1.to(others.dtype)
        if self.fusion == "concat":
            down = torch.cat(
                [a1.expand(*others.shape[:-1], -1), others @ self.a2.to(others.dtype)[:, None, None]], dim=-1
            )
            return down, torch.cat([b1, self.b2.to(others.dtype)], dim=1)
        gated = others * self.ratio.to(others.dtype)[:, None, None, None]
        identity = torch.eye(self.head_dim, dtype=others.dtype, device=others.device)
        return torch.cat([gated, a1 + gated @ a1], dim=-1), torch.cat([identity.expand(len(b1), -1, -1), b1], dim=1)

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, {self.num_modalities}, fusion={self.fusion!r}, rank={self.a1.shape[-1]}, "
            f"scope={self.scope!r}, key_norm={self.key_norm!r}, normalize={self.normalize!r}"
        )

    def _causal(self, query, key, query_modality, key_modality, state, return_indicator) -> tuple[Tensor, ...]:
        keywords = {"key_norm": self.key_norm, "normalize": self.normalize}
        if state is not None:
            key, key_modality = state.with_recent(key, key_modality)
            keywords["state"] = state.gram, state.trace
        modalities = query_modality, key_modality
        if self.fusion == "concat":
            weights = self.a1, self.b1, self.a2, self.b2
            results = duplex_query_views(
                query, key, *modalities, *weights, self.num_modalities, return_indicator=return_indicator, **keywords
            )
            return results if return_indicator else (results,)

        dtype = accumulation_dtype(query.dtype)
        raised = query.to(dtype)
        # view_a = q + q own_a + sum_{m != a} q cross_a (Ghat^m)^T
        own = (self.a1.to(dtype) @ self.b1.to(dtype)).mT
        cross = (torch.eye(self.head_dim, dtype=dtype, device=own.device) + own) * self.ratio.to(dtype)[:, None]
        asked = [raised @ cross[a] for a in range(self.num_modalities)] + [raised] * return_indicator
        # As many more query heads of the same group, so that one pass over the keys serves all of them.
        group = query.shape[1] // key.shape[1]
        heads = torch.stack([t.unflatten(1, (-1, group)) for t in asked], dim=2)  # (B, Hkv, asked, group, Nq, D)
        projection = causal_gram_projection(
            heads.flatten(1, 3), key.to(dtype), *modalities, self.num_modalities, **keywords
        )
        projection = projection.unflatten(2, heads.shape[1:4]).movedim(3, 0).flatten(3, 4)  # (asked, M, B, Hq, Nq, D)
        views = []
        for a in range(self.num_modalities):
            others = [projection[a, m] for m in range(self.num_modalities) if m != a]
            views.append(sum(others, start=raised + raised @ own[a]))
        views = torch.stack(views).to(query.dtype)
        return (views, gram_indicator(query, projection[-1])) if return_indicator else (views,)

    def _fixed(self, query: Tensor, gram: Tensor, return_indicator: bool) -> tuple[Tensor, ...]:
        """Views through one Gram for all rows: the small matrices first, then one product for each view."""
        down, up = self._factors(self._others(gram))
        maps = (down @ up[:, None, None]).mT  # (M, B, Hkv, D, D)
        group = query.shape[1] // gram.shape[1]
        grouped = query.to(gram.dtype).unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, group * Nq, D)
        views = (grouped + grouped @ maps).unflatten(3, (group, -1)).flatten(2, 3).to(query.dtype)
        return (views, gram_indicator(query, project_queries(query, gram))) if return_indicator else (views,)

    def _others(self, gram: Tensor) -> Tensor:
        """(M, B, Hkv, D, D): for each modality the sum of the others' Grams."""
        zero = torch.zeros_like(gram[:, :, 0])
        modalities = range(self.num_modalities)
        return torch.stack([sum((gram[:, :, m] for m in modalities if m != a), start=zero) for a in modalities])

    def check(self, query, key, state, include, return_state) -> None:
        """What the operators cannot know; they check the rest."""
        if query.dim() != 4 or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"DuplexAligner: query must have shape (B, Hq, Nq, {self.head_dim}), got {tuple(query.shape)}"
            )
        if key.dim() != 4 or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"DuplexAligner: key must have shape (B, Hkv, Nk, D) with Hkv a divisor of {query.shape[1]}, "
                f"got {tuple(key.shape)}"
            )
        if self.scope == "full" and (state is not None or return_state):
            raise ValueError("DuplexAligner: the full scope sees all tokens at once and has no state")
        if state is not None and (state.key_norm, state.window is None) != (self.key_norm, self.scope == "context"):
            raise ValueError(
                f"DuplexAligner: state must be of key_norm={self.key_norm!r} and scope={self.scope!r}, got "
                f"key_norm={state.key_norm!r} and a {'fixed' if state.window is None else 'running'} Gram"
            )
        if self.scope != "context" and include is not None:
            raise ValueError(f"DuplexAligner: include belongs to scope='context', this aligner has {self.scope!r}")
        if self.scope == "context" and (include is None) == (state is None):
            raise ValueError(
                "DuplexAligner: context scope needs include in the first call and state in every later one"
            )
