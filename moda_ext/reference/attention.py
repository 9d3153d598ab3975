"""Dense attention, equation by equation."""

import math

import torch
from torch import Tensor

from moda_ext.reference.common import Results, accumulation_dtype, pack_results, raise_if_on_host

__all__ = [
    "dense_attention",
    "merged_attention",
    "modular_attention",
    "modular_attention_varlen",
]


def modular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    """Dense :func:`moda_ext.attention.modular_attention`: the same arguments, the same results, any head size.

    float16 and bfloat16 inputs are computed in float32 and the output is rounded once.
    """
    key_modality = key_modality.long()
    raise_if_on_host(
        lambda: (key_modality < -1) | (key_modality >= num_modalities),
        f"modular_attention: key_modality must lie in [-1, {num_modalities}), with -1 for padding (num_modalities)",
    )
    dtype = accumulation_dtype(query.dtype)
    out, lse, mass = dense_attention(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        key_modality,
        num_modalities=num_modalities,
        modality_bias=None if modality_bias is None else modality_bias.to(dtype),
        sink=None if sink is None else sink.to(dtype),
        is_causal=is_causal,
        scale=scale,
    )
    return pack_results(out.to(query.dtype), lse, mass, return_lse, return_mass)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations step by step, each step in the dtype of ``query``.

        S_ij = scale q_i^(a_j) . k_j + b_{i,a_j}      p_ij = exp(S_ij) / (sum_j exp(S_ij) + exp(c_i))
        o_i = sum_j p_ij v_j      L_i = log(sum_j exp(S_ij) + exp(c_i))      mass_im = sum_{j: a_j = m} p_ij

    A row sees what is not padding, what ``is_causal`` allows and what ``visible`` allows: a boolean mask, broadcastable
    to (B, Hq, Nq, Nk), which the operators do not take. Bias and sink are taken relative to the largest of them that
    has a part in the row, which changes nothing but that scores are not rounded away beside a large one.

    Returns:
        ``(out, lse, mass)`` of shapes (B, Hq, Nq, D), (B, Hq, Nq), (B, Hq, Nq, M). A row that sees nothing has out 0,
        mass 0, lse = sink (or -inf), and passes zero gradients on.
    """
    batch, heads, rows, head_size = query.shape[-4:]
    kv_heads, columns = key.shape[1:3]
    scale = head_size**-0.5 if scale is None else scale
    views = query if query.dim() == 5 else query.unsqueeze(0)  # (1 or M, B, Hq, Nq, D)

    attended = (key_modality >= 0)[:, None, :, None]  # padding may hold anything, also NaN: 0 * NaN must not come in
    key = torch.where(attended, key, 0.0).repeat_interleave(heads // kv_heads, dim=1)
    value = torch.where(attended, value, 0.0).repeat_interleave(heads // kv_heads, dim=1)
    modality = key_modality[:, None, None, :]  # (B, 1, 1, Nk)
    visible = modality >= 0 if visible is None else visible & (modality >= 0)
    if is_causal:  # bottom-right aligned: the last query sees the last key
        i = torch.arange(rows, device=query.device)[:, None]
        visible = visible & (torch.arange(columns, device=query.device) <= i + (columns - rows))

    scores = scale * (views[0] @ key.mT)  # (B, Hq, Nq, Nk)
    for m in range(1, views.shape[0]):
        scores = torch.where(modality == m, scale * (views[m] @ key.mT), scores)
    bias = scores.new_zeros(())
    if modality_bias is not None:
        modality_bias = modality_bias.expand(batch, heads, rows, num_modalities)
        bias = modality_bias.gather(-1, modality.clamp(min=0).expand(batch, heads, rows, columns))
    sink = (scores.new_full((), -math.inf) if sink is None else sink).expand(batch, heads, rows)[..., None]
    shifts = bias.detach().expand(batch, heads, rows, columns).masked_fill(~visible, -math.inf)
    base = torch.cat([shifts, sink.detach()], dim=-1).amax(dim=-1, keepdim=True)
    base = base.masked_fill(base == -math.inf, 0.0)  # a row that sees nothing: exp(-inf - 0) = 0, never NaN
    scores = (scores + (bias - base)).masked_fill(~visible, -math.inf)

    logits = torch.cat([scores, sink - base], dim=-1)
    maximum = logits.detach().amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -math.inf, 0.0)
    weights = (logits - maximum).exp()
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    probability = (weights / total)[..., :columns]

    lse = ((total.log() + maximum) + base).masked_fill(empty, -math.inf).squeeze(-1)
    members = (key_modality[..., None] == torch.arange(num_modalities, device=key.device)).to(query.dtype)
    return probability @ value, lse, probability @ members[:, None]


def modular_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    """:func:`moda_ext.attention.modular_attention_varlen`, one dense call per sequence; reads ``cu_seqlens``."""
    tokens, heads, head_size = query.shape[-3:]
    q_bounds = sequence_bounds("cu_seqlens_q", cu_seqlens_q, tokens, max_seqlen_q)
    k_bounds = sequence_bounds("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    bias = None if modality_bias is None else modality_bias.expand(tokens, heads, num_modalities)
    sink = None if sink is None else sink.expand(tokens, heads)

    def batch_of_one(tokens: Tensor) -> Tensor:  # (..., N, H, X) -> (..., 1, H, N, X)
        return tokens.movedim(-3, -2).unsqueeze(-4)

    results = []
    for (q0, q1), (k0, k1) in zip(q_bounds, k_bounds, strict=True):
        results.append(
            modular_attention(
                batch_of_one(query[..., q0:q1, :, :]),
                batch_of_one(key[k0:k1]),
                batch_of_one(value[k0:k1]),
                key_modality[None, k0:k1],
                num_modalities=num_modalities,
                modality_bias=None if bias is None else batch_of_one(bias[q0:q1]),
                sink=None if sink is None else sink[q0:q1].mT[None],
                is_causal=is_causal,
                scale=scale,
                return_lse=True,
                return_mass=True,
            )
        )
    dtype = accumulation_dtype(query.dtype)
    out = torch.cat([query.new_zeros(0, heads, head_size)] + [out[0].transpose(0, 1) for out, _, _ in results])
    lse = torch.cat([query.new_zeros(0, heads, dtype=dtype)] + [lse[0].mT for _, lse, _ in results])
    mass = torch.cat(
        [query.new_zeros(0, heads, num_modalities, dtype=dtype)] + [mass[0].transpose(0, 1) for _, _, mass in results]
    )
    return pack_results(out, lse, mass, return_lse, return_mass)


def sequence_bounds(name: str, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> list[tuple[int, int]]:
    """(start, end) of every sequence, or ValueError when the offsets do not partition the tokens."""
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    if offsets[0] != 0 or offsets[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"modular_attention_varlen: {name} must rise from 0 to the number of tokens ({num_tokens}), got {offsets}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"modular_attention_varlen: {name.replace('cu_', 'max_').replace('seqlens', 'seqlen')} is {max_seqlen}, "
            f"but {name} holds a sequence of {max(lengths)} tokens"
        )
    return list(zip(offsets[:-1], offsets[1:], strict=True))


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The merge identity: one plain attention per modality, then a softmax over modalities.

        z_m = lse_m + b_m      L = logsumexp(z_1 .. z_M, c)      mass_m = exp(z_m - L)      o = sum_m mass_m o_m

    Returns ``(out, lse, mass)`` as :func:`dense_attention` does, for rows that see at least one key or have a sink.
    """
    outs, lses = [], []
    for m in range(num_modalities):
        out, lse, _ = dense_attention(
            query[m] if query.dim() == 5 else query,
            key,
            value,
            torch.where(key_modality == m, 0, -1),
            num_modalities=1,
            is_causal=is_causal,
            scale=scale,
        )
        outs.append(out)
        lses.append(lse)
    parts = torch.stack(lses, dim=-1)  # (B, Hq, Nq, M)
    bias = torch.zeros_like(parts) if modality_bias is None else modality_bias.expand_as(parts)
    column = parts[..., :0] if sink is None else sink.expand(parts.shape[:-1])[..., None]
    base = torch.cat([bias.masked_fill(parts == -math.inf, -math.inf), column], dim=-1).detach().amax(-1, keepdim=True)
    logits = parts + (bias - base)
    lse = torch.cat([logits, column - base], dim=-1).logsumexp(dim=-1, keepdim=True)
    mass = (logits - lse).exp()
    lse = (lse + base).squeeze(-1)
    out = sum((mass[..., m, None] * outs[m] for m in range(num_modalities)), start=torch.zeros_like(outs[0]))
    return out, lse, mass
