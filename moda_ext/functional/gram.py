"""Arithmetic around the Gram operators, in plain PyTorch: features of keys, norms and scales. Differentiable."""

from typing import TypedDict

import torch
from torch import Tensor

from moda_ext._ops.limits import accumulation_dtype


class GramOptions(TypedDict, total=False):
    """Keywords of the functions of a causal Gram."""

    key_norm: str | None
    normalize: str | None
    eps: float
    state: tuple[Tensor, Tensor] | None


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


def project(query: Tensor, gram: Tensor) -> Tensor:
    """q (Ghat^m)^T, (M, B, Hq, Nq, D) in the dtype of ``query``: see :func:`moda_ext.alignment.project_queries`."""
    batch, heads, rows, head_size = query.shape
    kv_heads, num_modalities = gram.shape[1:3]
    grouped = query.to(gram.dtype).reshape(batch, kv_heads, heads // kv_heads * rows, head_size)
    projection = grouped @ gram.movedim(2, 0).mT  # (M, B, Hkv, group * Nq, D)
    return projection.reshape(num_modalities, batch, heads, rows, head_size).to(query.dtype)


def key_features(key: Tensor, modality: Tensor, key_norm: str | None, eps: float) -> Tensor:
    """phi(k) in the accumulation dtype; 0 for padding, which may hold anything."""
    key = torch.where((modality >= 0)[:, None, :, None], key.to(accumulation_dtype(key.dtype)), 0.0)
    return key if key_norm is None else key / torch.linalg.vector_norm(key, dim=-1, keepdim=True).clamp(min=eps)


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


def _reciprocal(norm: Tensor) -> Tensor:
    """1 / norm, and 0 with derivative 0 where norm is 0."""
    present = norm > torch.finfo(norm.dtype).tiny
    return torch.where(present, norm.masked_fill(~present, 1.0).reciprocal(), 0.0)
