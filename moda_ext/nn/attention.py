"""The whole MODA attention layer. Public as ``moda_ext.attention.ModularDuplexAttention``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moda_ext._ops import backend, mkl
from moda_ext.functional.attention import as_int32, modular_attention
from moda_ext.functional.duplex import duplex_attention
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.guards import refuse_split_heads, refuse_split_tokens
from moda_ext.nn.layer import DuplexLayer
from moda_ext.nn.mask import ModularMask
from moda_ext.nn.states import AttentionState, GramState

__all__ = ["ModularDuplexAttention"]


class Tokens(NamedTuple):
    """Queries, keys and modalities of one call in the form of the operators, aligned at the bottom right."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_modality: Tensor
    key_modality: Tensor
    new_key: Tensor  # those that the Gram of the tokens before does not hold
    new_modality: Tensor
    scale: float


class Attended(NamedTuple):
    """``lse`` is None for the split softmax; ``views`` and ``bias`` where they were made."""

    out: Tensor
    lse: Tensor | None
    mass: Tensor
    views: Tensor | None
    bias: Tensor | None
    gram: GramState | None


def align_and_attend(
    aligner: DuplexAligner | None,
    mask: ModularMask | None,
    tokens: Tokens,
    num_modalities: int,
    *,
    gram: GramState | None = None,
    context: Tensor | None = None,
    keep_gram: bool = False,
    start: Tensor | int = 0,
    is_causal: bool = True,
    attention: Callable = modular_attention,
    return_terms: bool = False,
) -> Attended:
    """Duplex attention with any aligner and mask, which may both be missing.

    Args:
        aligner, mask: the modules.
        tokens: the tokens of the call.
        num_modalities: M.
        gram: the Gram of the tokens before, None for none.
        context: the context of an aligner with ``scope="context"``.
        keep_gram: also make the Gram after this call.
        start: (B,) or a number, how many tokens came before the queries without padding.
        is_causal: as in ``modular_attention``.
        attention: what is called in place of ``modular_attention``, with its arguments; for the joint softmax only.
        return_terms: also return the views and the bias.
    """
    query, key, value, query_modality, key_modality, new_key, new_modality, scale = tokens
    conditional = aligner is not None and mask is not None and mask.conditional
    joint = mask is None or mask.softmax == "joint"
    fusible = aligner is not None and aligner.fusion == "concat" and aligner.scope == "causal" and is_causal and joint
    fusible = fusible and attention is modular_attention and not return_terms
    parameters = (
        () if aligner is None or not fusible else (*aligner.parameters(), *(() if mask is None else mask.parameters()))
    )
    sums = () if gram is None else (gram.gram, gram.key)
    tensors = query, key, value, new_key, *sums, *parameters
    if aligner is not None and fusible and backend.choose("duplex_attention", *tensors) == backend.NATIVE:
        aligner.check(query, new_key, gram, context, keep_gram)
        recent, before = (new_key, new_modality), None
        if gram is not None:
            recent, before = gram.with_recent(*recent), (gram.gram, gram.trace)
        bias, sink, condition = None, None, None
        if mask is not None:
            bias, sink, condition = mask(query, query_modality, start=start, return_condition=True)
        weights = aligner.a1, aligner.b1, aligner.a2, aligner.b2
        out, lse, mass = duplex_attention(
            query,
            key,
            value,
            query_modality,
            key_modality,
            *weights,
            num_modalities,
            new_key=recent[0],
            new_modality=recent[1],
            key_norm=aligner.key_norm,
            normalize=aligner.normalize,
            state=before,
            modality_bias=bias,
            condition=condition,
            sink=sink,
            scale=scale,
            return_lse=True,
            return_mass=True,
        )
        after = aligner.state_after(new_key, new_modality, gram) if keep_gram else None
        return Attended(out, lse, mass, None, None, after)

    views, indicator, after = query, None, None
    if aligner is not None:
        results = aligner(
            query,
            new_key,
            query_modality,
            new_modality,
            gram,
            include=context,
            return_indicator=conditional,
            return_state=keep_gram,
        )
        views, *rest = results if isinstance(results, tuple) else (results,)
        indicator = rest[0] if conditional else None
        after = rest[-1] if keep_gram else None
    bias, sink = (None, None) if mask is None else mask(query, query_modality, start=start, indicator=indicator)
    if mask is None or joint:
        out, lse, mass = attention(
            views,
            key,
            value,
            key_modality,
            num_modalities=num_modalities,
            modality_bias=bias,
            sink=sink,
            is_causal=is_causal,
            scale=scale,
            return_lse=True,
            return_mass=True,
        )
    else:
        out, mass = mask.attend(
            views,
            key,
            value,
            query_modality,
            key_modality,
            bias,
            sink,
            is_causal=is_causal,
            scale=scale,
            return_mass=True,
        )
        lse = None
    return Attended(out, lse, mass, views, bias, after)


class ModularDuplexAttention(DuplexLayer):
    r"""A complete attention layer with duplex alignment and the modular mask.

    .. math::
        q, k, v = x W_q, x W_k, x W_v \quad \text{with RoPE on } q, k; \qquad
        \text{out} = \text{modular\_attention}\big(q^{(1..M)}, k, v;\ b, c\big)\, W_o

    where :class:`moda_ext.alignment.DuplexAligner` makes the views :math:`q^{(m)}` and
    :class:`moda_ext.mask.ModularMask` the bias b and the sink c. The projections are named ``q_proj``, ``k_proj``,
    ``v_proj`` and ``o_proj``, as in LLaMA's state dict. Source: MODA (arXiv 2507.04635), section 3.3.

    Args:
        embed_dim: E.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq; None is Hq.
        num_modalities: M, 1 to 16.
        head_dim: D, by default E // Hq.
        bias: biases of the four projections.
        is_causal: a causal layer. One that is not needs all tokens in one call.
        rope_base: base of the rotary position embedding (halves rotated, as in LLaMA); None is no RoPE.
        aligner: True, the defaults of ``DuplexAligner`` (with ``scope="full"`` if the layer is not causal); a dict of
            its keyword arguments; or False, no aligner.
        mask: True, the defaults of ``ModularMask``; a dict of its keyword arguments; or False, no mask.

    A new layer with ``mask={"base": -math.inf}`` computes what it computes without aligner and mask. With the default
    ``base=0`` the pseudo scores have an effect from the start.

    Raises:
        ValueError: a size that does not fit, or options that exclude each other.

    Example:
        >>> layer = ModularDuplexAttention(64, num_heads=4, num_kv_heads=2)
        >>> x, modality = torch.randn(1, 6, 64), torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> layer(x, modality).shape
        torch.Size([1, 6, 64])
        >>> state = AttentionState()  # the same in two pieces
        >>> _ = layer(x[:, :5], modality[:, :5], state=state)
        >>> layer(x[:, 5:], modality[:, 5:], state=state).shape
        torch.Size([1, 1, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        num_modalities: int = 2,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        is_causal: bool = True,
        rope_base: float | None = 10_000.0,
        aligner: bool | dict = True,
        mask: bool | dict = True,
    ):
        super().__init__()
        mkl.warm_up()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"ModularDuplexAttention: num_heads must be a multiple of num_kv_heads, got {num_heads} and "
                f"{num_kv_heads}"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"ModularDuplexAttention: embed_dim must be a multiple of num_heads, or head_dim be given, got "
                    f"{embed_dim} and {num_heads}"
                )
            head_dim = embed_dim // num_heads
        if rope_base is not None and head_dim % 2:
            raise ValueError(f"ModularDuplexAttention: head_dim must be even for RoPE, got {head_dim}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.num_modalities, self.head_dim = num_modalities, head_dim
        self.is_causal, self.rope_base = is_causal, rope_base
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.recorder: Callable[..., None] | None = None  # set by moda_ext.diagnostics.AttentionMeter while it measures
        self.aligner: DuplexAligner | None = None
        self.mask: ModularMask | None = None
        if aligner is not False:
            options = {"scope": "causal" if is_causal else "full", **({} if aligner is True else aligner)}
            self.aligner = DuplexAligner(head_dim, num_modalities, **options)
            if is_causal and self.aligner.scope == "full":
                raise ValueError(
                    "ModularDuplexAttention: aligner scope 'full' in a causal layer would show every token the later "
                    "ones; use 'causal', or 'context' with the prompt as context"
                )
        if mask is not False:
            self.mask = ModularMask(num_heads, num_modalities, **({} if mask is True else mask))
            if self.mask.conditional and self.aligner is None:
                raise ValueError(
                    f"ModularDuplexAttention: mask variant {self.mask.variant!r} is conditioned on the aligner's Gram; "
                    "give the layer an aligner, or the mask variant 'fix'"
                )

    def forward(
        self,
        x: Tensor,
        modality: Tensor,
        *,
        positions: Tensor | None = None,
        state: AttentionState | None = None,
        context: Tensor | None = None,
        return_mass: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over ``x``, after the tokens in ``state`` if there is one.

        Args:
            x: (B, N, E), in the dtype of the weights: float32, float64, bfloat16 or float16.
            modality: (B, N), integer, in [0, M), -1 for padding, wherever it is.
            positions: (B, N) or (N,), for RoPE. By default tokens are counted from 0, after those of ``state``, without
                padding. The pseudo scores always count like this.
            state: the tokens before (B, ...); **updated in place** by the new ones. Only in a causal layer. Chunked
                prefill and decoding token by token agree with one call over all tokens, within rounding.
            context: (B, N), boolean: the context, for ``scope="context"``; in the first call of a state only.
            return_mass: also return the attention mass.

        Returns:
            (B, N, E), 0 in rows of padding, or the tuple ``(out, mass)`` with mass (B, Hq, N, M), see
            :func:`moda_ext.attention.modular_attention`; after :func:`moda_ext.distributed.split_heads` with the Hq / W
            heads of this process.

        Raises:
            ValueError: a shape that does not fit, or a state in a layer that is not causal.
            RuntimeError: the projections are tensor parallel, and the layer was not told by
                :func:`moda_ext.distributed.split_heads`.
            TypeError, NotImplementedError: as ``modular_attention``, and the latter under torch's context parallelism.
        """
        refuse_split_tokens("ModularDuplexAttention", "moda_ext.distributed.context_parallel_attention")
        if x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            raise ValueError(
                f"ModularDuplexAttention: x must have shape (B, N, {self.q_proj.in_features}), got {tuple(x.shape)}"
            )
        if modality.shape != x.shape[:2]:
            raise ValueError(
                f"ModularDuplexAttention: modality must have shape {tuple(x.shape[:2])}, got {tuple(modality.shape)}"
            )
        if positions is not None and positions.shape not in (modality.shape, modality.shape[1:]):
            raise ValueError(
                f"ModularDuplexAttention: positions must have shape {tuple(modality.shape)} or "
                f"{tuple(modality.shape[1:])}, got {tuple(positions.shape)}"
            )
        if state is not None and not self.is_causal:
            raise ValueError("ModularDuplexAttention: a layer that is not causal cannot decode, state must be None")
        before = None if state is None else state._tokens()
        if before is not None and before[0].shape[0] != x.shape[0]:
            raise ValueError(
                f"ModularDuplexAttention: state must have the batch size of x ({x.shape[0]}), got {before[0].shape[0]}"
            )

        modality = as_int32(modality)
        seen = 0 if before is None else (before[2] >= 0).sum(dim=1)  # (B,)
        query, key, value = (  # (B, H, N, D), in memory (B, N, H, D)
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        expected = self.whole_heads // self.own_share, self.whole_kv_heads // self.own_share
        refuse_split_heads("ModularDuplexAttention", (query.shape[1], key.shape[1]), expected)
        if self.rope_base is not None:
            if positions is None:
                start = seen[:, None] if isinstance(seen, Tensor) else seen
                positions = start + (modality >= 0).cumsum(dim=1) - 1
            cos, sin = self._rotation(positions, self.rope_base)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)

        if self.aligner is None and context is not None:
            raise ValueError("ModularDuplexAttention: context is for the aligner, and this layer has none")
        new_key, key_modality = key, modality
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
            key_modality = torch.cat([before[2], modality], dim=1)
        scale = self.head_dim**-0.5
        with self.own_heads():
            out, lse, mass, views, bias, gram = align_and_attend(
                self.aligner,
                self.mask,
                Tokens(query, key, value, modality, key_modality, new_key, modality, scale),
                self.num_modalities,
                gram=None if state is None else state.gram,
                context=context,
                keep_gram=state is not None,
                start=seen,
                is_causal=self.is_causal,
                return_terms=self.recorder is not None,
            )
        if state is not None:
            state.key, state.value, state.modality, state.gram = key, value, key_modality, gram
        if self.recorder is not None:
            self.recorder(
                mass=mass,
                lse=lse,
                query_modality=modality,
                key_modality=key_modality,
                query=views,
                key=key,
                scale=scale,
                bias=bias,
                mesh=None if self.head_split is None else self.head_split.mesh,
            )
        padding = modality < 0
        out = self.o_proj(out.transpose(1, 2).flatten(2)).masked_fill(padding[..., None], 0.0)
        return (out, mass.masked_fill(padding[:, None, :, None], 0.0)) if return_mass else out

    @property
    def whole_heads(self) -> int:
        return self.num_heads

    @property
    def whole_kv_heads(self) -> int:
        return self.num_kv_heads

    def extra_repr(self) -> str:
        return f"num_modalities={self.num_modalities}, is_causal={self.is_causal}, rope_base={self.rope_base}"

    def _rotation(self, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, 1, N, D / 2) or (N, D / 2), at least in float32: a low precision cannot hold a position."""
        dtype = torch.float64 if self.q_proj.weight.dtype == torch.float64 else torch.float32
        half = self.head_dim // 2
        frequency = base ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
        angle = positions.to(dtype)[..., None] * frequency
        angle = angle.unsqueeze(1) if positions.dim() == 2 else angle
        return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, N, D)."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
