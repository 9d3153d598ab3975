"""The alignment operators with every product written out, an Nq x Nk matrix of scores for every modality."""

import torch
from torch import Tensor

from moda_ext.reference.common import Results, accumulation_dtype, members

__all__ = [
    "causal_gram_projection",
    "duplex_query_views",
    "modality_gram",
    "normalize_gram",
    "project_queries",
]


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
    counted = members("modality_gram", "modality", modality, num_modalities)
    if include is not None:
        counted = counted & include[..., None]
    features, counted = key_features(key, modality, key_norm, eps), counted.to(accumulation_dtype(key.dtype))
    gram = torch.einsum("bhnd,bnm,bhne->bhmde", features, counted, features)
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
) -> Results:
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
) -> Results:
    """Dense :func:`moda_ext.alignment.duplex_query_views`: the causal projection, then both fusers one after the other.

    q^(a) = q W1_a^T + sum_{m != a} (q Ghat^m_{<=i}) W2_a^T      with W1_a = I + A1_a B1_a, W2_a = A2_a B2_a

    The product is taken in the other order, (q W2_a^T) Ghat^m: the projection is linear in its query.
    """
    op = "duplex_query_views"
    dtype = accumulation_dtype(query.dtype)
    a1, b1, a2, b2 = (w.to(dtype) for w in (a1, b1, a2, b2))
    upcast = query.to(dtype)
    rest = (key, query_modality, key_modality, num_modalities, key_norm, normalize, eps, state)
    views = []
    for a in range(num_modalities):
        view = upcast + upcast @ b1[a].mT @ a1[a].mT
        projection, scale, _ = _causal_products(op, upcast @ b2[a].mT @ a2[a].mT, *rest)
        others = [scale[..., m, None] * projection[m] for m in range(num_modalities) if m != a]
        views.append(sum(others, start=view))
    projection, scale, state = _causal_products(op, upcast, *rest)
    results: list[Tensor | tuple[Tensor, Tensor]] = [torch.stack(views).to(query.dtype)]
    if return_indicator:
        square = torch.einsum("mbhnd,bhnd->bhnm", projection, upcast)
        results.append(scale * square * _reciprocal(upcast.square().sum(-1, keepdim=True)))
    if return_state:
        results.append(state)
    return results[0] if len(results) == 1 else tuple(results)


def _causal_products(
    op: str,
    query: Tensor,
    key: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(M, B, Hq, Nq, D) raw projections, (B, Hq, Nq, M) scale of every row and the state (raw Gram, trace) after it."""
    dtype = accumulation_dtype(key.dtype)
    group, columns, rows = query.shape[1] // key.shape[1], key.shape[2], query.shape[2]
    counted = members(op, "key_modality", key_modality, num_modalities).to(dtype)
    features = key_features(key, key_modality, key_norm, eps)
    before = features.new_zeros(*key.shape[:2], num_modalities, *key.shape[-1:] * 2)
    before = before if state is None else state[0].to(dtype)
    own = torch.einsum("bhnd,bnm,bhne->bhmde", features, counted, features)
    # tr G_<=i = sum of |phi_j|^2, and the state's trace
    squares = features.square().sum(-1)[..., None] * counted[:, None]  # (B, Hkv, Nk, M)
    traces = squares.cumsum(2) + (0.0 if state is None else state[1].to(dtype)[:, :, None])
    trace = squares.sum(2) + (0.0 if state is None else state[1].to(dtype))
    scale = torch.ones_like(traces)
    if normalize == "trace":
        scale = _reciprocal(traces)
    elif normalize == "frobenius":  # |G_<=i|^2 = sum over pairs of keys (phi_j . phi_j')^2, and the state's part
        pairs = (features @ features.mT).square()[..., None] * (counted[:, :, None] * counted[:, None])[:, None]
        pairs = pairs.cumsum(2).cumsum(3).diagonal(dim1=2, dim2=3).mT  # (B, Hkv, Nk, M)
        crossed = torch.einsum("bhnd,bhmde,bhne,bnm->bhnm", features, before, features, counted).cumsum(2)
        square = before.square().sum((-2, -1))[:, :, None] + 2 * crossed + pairs
        absent = square <= 0  # the root has no derivative at 0
        scale = square.masked_fill(absent, 1.0).rsqrt().masked_fill(absent, 0.0)
    scale = scale[:, :, columns - rows :].masked_fill((query_modality < 0)[:, None, :, None], 0.0)

    def per_query_head(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(group, dim=1)

    i = torch.arange(rows, device=query.device)[:, None]
    causal = torch.arange(columns, device=query.device) <= i + (columns - rows)
    query = query.to(dtype)
    scores = (query @ per_query_head(features).mT).masked_fill(~causal, 0.0)
    projection = torch.stack(
        [
            (scores * counted[:, None, None, :, m]) @ per_query_head(features) + query @ per_query_head(before[:, :, m])
            for m in range(num_modalities)
        ]
    )
    return projection, per_query_head(scale), (before + own, trace)


def key_features(key: Tensor, modality: Tensor, key_norm: str | None, eps: float) -> Tensor:
    """phi(k) in the accumulation dtype; 0 for padding, which may hold anything."""
    key = torch.where((modality >= 0)[:, None, :, None], key.to(accumulation_dtype(key.dtype)), 0.0)
    return key if key_norm is None else key / torch.linalg.vector_norm(key, dim=-1, keepdim=True).clamp(min=eps)


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 with derivative 0 where norm is 0."""
    present = norm > torch.finfo(norm.dtype).tiny
    return torch.where(present, norm.masked_fill(~present, 1.0).reciprocal(), 0.0)
