"""Plain-PyTorch operators: dense, differentiable by autograd, on any device and in any floating-point dtype.

They are the tests' oracle (run them in float64) and what the package runs when the native library is not built. Memory
is O(Nq * Nk). Everything follows the equations; the one liberty is that the sink is one more column of the scores,
which is what a sum of exponentials that only enlarges the denominator amounts to.
"""

import math

import torch
from torch import Tensor

from moda_ext._ops.checks import accumulation_dtype

__all__ = [
    "causal_gram_projection",
    "dense_attention",
    "duplex_query_views",
    "merged_attention",
    "modality_gram",
    "modular_attention",
    "modular_attention_varlen",
    "project_queries",
    "pseudo_score_sink",
    "stable_mask_weights",
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
):
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
):
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


def pseudo_score_sink(
    num_rows: int,
    length: int | None,
    decay: float | Tensor,
    *,
    base: float | Tensor = 0.0,
    start: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`moda_ext.attention.pseudo_score_sink` in plain PyTorch, differentiable in ``decay`` and ``base``.

    With ``left`` = length - i pseudo scores in row i and x = decay * left,

        c = base + log((1 - e^-x) / (1 - e^-decay))                             x not small
        c = base + log(left) - (x - decay) / 2 + (x^2 - decay^2) / 24           x small; the remainder is below x^4 /
        2880

    The second line holds at decay = 0 as well, with the right derivative -(left - 1) / 2.
    """
    work = accumulation_dtype(dtype)
    given = [t for t in (decay, base) if isinstance(t, Tensor)]
    device = given[0].device if given else device
    decay, base = (  # (H, 1) or (1,)
        t.to(work)[..., None] if isinstance(t, Tensor) else torch.full((1,), t, dtype=work, device=device)
        for t in (decay, base)
    )
    raise_if_on_host(
        lambda: ~(decay >= 0), "pseudo_score_sink: decay must be at least 0, got a tensor with a smaller value or NaN"
    )
    if length is None:
        raise_if_on_host(
            lambda: decay == 0,
            "pseudo_score_sink: decay must be above 0 when length is None, or the sum of pseudo scores is infinite",
        )
        sink = base - (-torch.expm1(-decay)).log()
        return sink.expand(*sink.shape[:-1], num_rows).to(dtype)

    left = length - start - torch.arange(1, num_rows + 1, device=decay.device)
    return sink_of_left(left, decay, base).to(dtype)


def sink_of_left(left: Tensor, decay: Tensor, base: Tensor) -> Tensor:
    """The sink of rows with ``left`` pseudo scores (integers, any shape), -inf where none is left; differentiable."""
    none_left = left <= 0
    left = left.clamp(min=1).to(decay.dtype)
    x = decay * left
    small = x < 1e-2
    series = left.log() - (x - decay) / 2 + (x.square() - decay.square()) / 24
    x, decay = x.masked_fill(small, 1.0), decay.expand_as(x).masked_fill(small, 1.0)  # no 0 / 0, also in the gradient
    sink = base + torch.where(small, series, (torch.expm1(-x) / torch.expm1(-decay)).log())
    return sink.masked_fill(none_left, -math.inf)


def stable_mask_weights(scores: Tensor, decay: float, base: float = 0.0) -> Tensor:
    """Causal attention weights the way StableMask (arXiv 2402.04779) writes them: softmax(A * C + P) * C.

    ``scores`` A is (..., N, n) for the rows i = 1..N of a sequence of maximal length n. C is 1 on and below the
    diagonal and 0 above it. P is 0 where C is 1, and holds the pseudo score base - (j - i - 1) decay at column j > i.
    """
    i = torch.arange(1, scores.shape[-2] + 1, device=scores.device)[:, None]
    j = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    causal = (j <= i).to(scores.dtype)
    pseudo = (base - (j - i - 1) * decay).to(scores.dtype) * (1 - causal)
    return torch.softmax(scores * causal + pseudo, dim=-1) * causal


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
    lses = torch.stack(lses, dim=-1)  # (B, Hq, Nq, M)
    bias = torch.zeros_like(lses) if modality_bias is None else modality_bias.expand_as(lses)
    column = lses[..., :0] if sink is None else sink.expand(lses.shape[:-1])[..., None]
    base = torch.cat([bias.masked_fill(lses == -math.inf, -math.inf), column], dim=-1).detach().amax(-1, keepdim=True)
    logits = lses + (bias - base)
    lse = torch.cat([logits, column - base], dim=-1).logsumexp(dim=-1, keepdim=True)
    mass = (logits - lse).exp()
    lse = (lse + base).squeeze(-1)
    out = sum(mass[..., m, None] * outs[m] for m in range(num_modalities))
    return out, lse, mass


def modality_gram(
    key: Tensor,
    modality: Tensor,
    num_modalities: int = 2,
    *,
    include: Tensor | None = None,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
) -> Tensor:
    """:func:`moda_ext.alignment.modality_gram` in plain PyTorch: one masked product of the keys with themselves each.

    G^m = sum_{j: a_j = m} phi(k_j)^T phi(k_j)      Ghat^m = G^m / norm
    """
    members = _members("modality_gram", "modality", modality, num_modalities)
    if include is not None:
        members = members & include[..., None]
    features, members = key_features(key, modality, key_norm, eps), members.to(accumulation_dtype(key.dtype))
    gram = torch.einsum("bhnd,bnm,bhne->bhmde", features, members, features)
    return normalize_gram(gram, normalize)


def normalize_gram(gram: Tensor, normalize: str | None) -> Tensor:
    """Ghat of the raw sums ``gram`` (..., D, D): divided by trace, Frobenius norm or row norms; 0 stays 0, not NaN."""
    if normalize == "trace":
        norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    elif normalize == "frobenius":
        norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    elif normalize == "row":
        norm = torch.linalg.vector_norm(gram, dim=-1, keepdim=True)
    else:
        return gram
    return gram * _reciprocal(norm)


def project_queries(query: Tensor, gram: Tensor) -> Tensor:
    """:func:`moda_ext.alignment.project_queries`: (M, B, Hq, Nq, D) of q (Ghat^m)^T, in the dtype of ``query``."""
    batch, heads, rows, head_size = query.shape
    kv_heads, num_modalities = gram.shape[1:3]
    grouped = query.to(gram.dtype).reshape(batch, kv_heads, heads // kv_heads * rows, head_size)
    projection = grouped @ gram.movedim(2, 0).mT  # (M, B, Hkv, group * Nq, D)
    return projection.reshape(num_modalities, batch, heads, rows, head_size).to(query.dtype)


def causal_gram_projection(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int = 2,
    *,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
):
    """Dense :func:`moda_ext.alignment.causal_gram_projection`: an Nq x Nk matrix of scores for every modality.

    q_i Ghat^m_{<=i} = s_im (q_i G^m_0 + sum_{j <= i, a_j = m} (q_i . phi_j) phi_j)
    """
    projection, scale, state = _causal_products(
        "causal_gram_projection",
        query,
        key,
        query_modality,
        key_modality,
        num_modalities,
        key_norm,
        normalize,
        eps,
        state,
    )
    projection = (projection * scale.movedim(-1, 0)[..., None]).to(query.dtype)
    return (projection, state) if return_state else projection


def duplex_query_views(
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    *,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    return_indicator: bool = False,
    return_state: bool = False,
):
    """Dense :func:`moda_ext.alignment.duplex_query_views`: the causal projection, then both fusers one after the other.

    q^(a) = q W1_a^T + sum_{m != a} (q Ghat^m_{<=i}) W2_a^T      with W1_a = I + A1_a B1_a, W2_a = A2_a B2_a

    The product is taken in the other order, (q W2_a^T) Ghat^m: the projection is linear in its query.
    """
    op = "duplex_query_views"
    dtype = accumulation_dtype(query.dtype)
    a1, b1, a2, b2 = (w.to(dtype) for w in (a1, b1, a2, b2))
    raised = query.to(dtype)
    rest = (key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state)
    views = []
    for a in range(num_modalities):
        view = raised + raised @ b1[a].mT @ a1[a].mT
        projection, scale, _ = _causal_products(op, raised @ b2[a].mT @ a2[a].mT, *rest)
        others = [scale[..., m, None] * projection[m] for m in range(num_modalities) if m != a]
        views.append(sum(others, start=view))
    projection, scale, state = _causal_products(op, raised, *rest)
    results = [torch.stack(views).to(query.dtype)]
    if return_indicator:
        square = torch.einsum("mbhnd,bhnd->bhnm", projection, raised)
        results.append(scale * square * _reciprocal(raised.square().sum(-1, keepdim=True)))
    if return_state:
        results.append(state)
    return results[0] if len(results) == 1 else tuple(results)


def causal_gram_scale(
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """What the causal Gram of every row is multiplied with, (B, Hkv, Nq, M), and the trace after the last key.

    1 / trace of the raw Gram that the row sees (``normalize="trace"``), or 1 (None); 0 for a padded row and for a
    modality that the row has not seen. For unit keys the trace is a count, which no key longer than ``eps`` changes:
    its derivative is taken as 0.
    """
    dtype = accumulation_dtype(key.dtype)
    rows, columns = query_modality.shape[1], key.shape[2]
    if key_norm is None:
        key = torch.where((key_modality >= 0)[:, None, :, None], key, 0.0)  # padding may hold anything
        square = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).square()  # (B, Hkv, Nk)
    else:
        norm = torch.linalg.vector_norm(key.detach(), dim=-1, dtype=dtype)
        square = (norm.clamp(max=eps) / eps).square()
    members = key_modality[..., None] == torch.arange(num_modalities, device=key.device)
    parts = torch.where(members[:, None], square[..., None], 0.0)  # (B, Hkv, Nk, M)
    total, seen = parts.sum(dim=2), parts.cumsum(dim=2)[:, :, columns - rows :]
    if state is not None:
        before = state[1].to(dtype)
        total, seen = total + before, seen + before[:, :, None]
    scale = _reciprocal(seen) if normalize == "trace" else torch.ones_like(seen)
    return scale.masked_fill((query_modality < 0)[:, None, :, None], 0.0), total


def frobenius_scale(square: Tensor, scale: Tensor) -> Tensor:
    """``scale`` over the root of ``square``, the squared Frobenius norm that each row sees; 0 where that is 0."""
    seen = square > 0  # the root has no derivative at 0
    return torch.where(seen, square.masked_fill(~seen, 1.0).rsqrt(), 0.0) * scale


def _causal_products(op, query, key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state):
    """(M, B, Hq, Nq, D) raw projections, (B, Hq, Nq, M) scale of every row and the state (raw Gram, trace) after it."""
    dtype = accumulation_dtype(key.dtype)
    group, columns, rows = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
    members = _members(op, "key_modality", key_modality, num_modalities).to(dtype)
    features = key_features(key, key_modality, key_norm, eps)
    scale, trace = causal_gram_scale(key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state)
    before = features.new_zeros(*key.shape[:2], num_modalities, *key.shape[-1:] * 2)
    before = before if state is None else state[0].to(dtype)
    own = torch.einsum("bhnd,bnm,bhne->bhmde", features, members, features)
    if normalize == "frobenius":  # ||G_<=i||^2 = sum over pairs of keys (phi_j . phi_j')^2, and the state's part
        pairs = (features @ features.mT).square()[..., None] * (members[:, :, None] * members[:, None])[:, None]
        pairs = pairs.cumsum(2).cumsum(3).diagonal(dim1=2, dim2=3).mT  # (B, Hkv, Nk, M)
        crossed = torch.einsum("bhnd,bhmde,bhne,bnm->bhnm", features, before, features, members).cumsum(2)
        square = before.square().sum((-2, -1))[:, :, None] + 2 * crossed + pairs
        scale = frobenius_scale(square[:, :, columns - rows :], scale)

    def per_query_head(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(group, dim=1)

    i = torch.arange(rows, device=query.device)[:, None]
    causal = torch.arange(columns, device=query.device) <= i + (columns - rows)
    query = query.to(dtype)
    scores = (query @ per_query_head(features).mT).masked_fill(~causal, 0.0)
    projection = torch.stack(
        [
            (scores * members[:, None, None, :, m]) @ per_query_head(features) + query @ per_query_head(before[:, :, m])
            for m in range(num_modalities)
        ]
    )
    return projection, per_query_head(scale), (before + own, trace)


def _members(op: str, name: str, modality: Tensor, num_modalities: int) -> Tensor:
    """(B, N, M): whether token j is of modality m. ValueError for an id outside [-1, M) that can be read."""
    raise_if_on_host(
        lambda: (modality < -1) | (modality >= num_modalities),
        f"{op}: {name} must lie in [-1, {num_modalities}), with -1 for padding (num_modalities)",
    )
    return modality[..., None] == torch.arange(num_modalities, device=modality.device)


def key_features(key: Tensor, modality: Tensor, key_norm: str | None, eps: float) -> Tensor:
    """phi(k) in the accumulation dtype; 0 for padding, which may hold anything."""
    key = torch.where((modality >= 0)[:, None, :, None], key.to(accumulation_dtype(key.dtype)), 0.0)
    return key if key_norm is None else key / torch.linalg.vector_norm(key, dim=-1, keepdim=True).clamp(min=eps)


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 with derivative 0 where norm is 0."""
    present = norm > torch.finfo(norm.dtype).tiny
    return torch.where(present, norm.masked_fill(~present, 1.0).reciprocal(), 0.0)


def pack_results(out: Tensor, lse: Tensor, mass: Tensor, return_lse: bool, return_mass: bool):
    """out, or the tuple (out[, lse][, mass]) that was asked for."""
    if not (return_lse or return_mass):
        return out
    return (out, *((lse,) if return_lse else ()), *((mass,) if return_mass else ()))


def raise_if_on_host(violated, message: str) -> None:
    """ValueError(message) when the boolean tensor ``violated()`` holds anywhere, wherever reading it costs no sync.

    Not while compiling; under vmap or with fake tensors there is no value to read; on another device it would wait.
    """
    if torch.compiler.is_compiling():
        return
    condition = violated()
    if condition.device.type != "cpu":
        return
    try:
        found = bool(condition.any())
    except RuntimeError:
        return
    if found:
        raise ValueError(message)
