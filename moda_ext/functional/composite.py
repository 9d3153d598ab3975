"""The alignment operators in plain PyTorch, chunk by chunk: what runs in float64 on CUDA, where they have no kernels.

Each function has the arguments and results of the operator of the same name (csrc/ops/schemas.cpp), and PyTorch
differentiates it. Unlike moda_ext.reference nothing is N x N: the Gram matrix before every chunk of keys is held (one
D x D state for each chunk, modality and head), and only keys inside a chunk are met one by one. All sums are float32
(float64 for float64); the products are batched matrix products, so a GPU's matrix library does the work.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from moda_ext.functional.gram import key_features

CHUNK = 128  # at D = 128 the state of a chunk costs as much as the scores inside it


def modality_gram(key: Tensor, modality: Tensor, num_modalities: int, unit_keys: bool, eps: float) -> Tensor:
    features = key_features(key, modality, "l2" if unit_keys else None, eps)
    keys = [torch.where((modality == m)[:, None, :, None], features, 0.0) for m in range(num_modalities)]
    return torch.stack([k.mT @ k for k in keys], dim=2)


def causal_gram_projection(
    query: Tensor,
    key: Tensor,
    key_modality: Tensor,
    row_scale: Tensor,
    initial: Tensor | None,
    num_modalities: int,
    unit_keys: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out_im = s_im (q_i G^m_0 + sum_{j <= i, a_j = m} (q_i . phi_j) phi_j) and the Gram after the last key."""
    chunks = _Chunks(key, key_modality, query.shape[2], initial, num_modalities, unit_keys, eps)
    rows, scale = chunks.cut_rows(query), chunks.cut_scale(row_scale)
    scores = chunks.scores(rows)
    projection = torch.stack([chunks.project(rows, scores, m) * scale[..., m, None] for m in range(num_modalities)])
    return chunks.join(projection).to(query.dtype), chunks.gram


def duplex_query_views(
    query: Tensor,
    key: Tensor,
    key_modality: Tensor,
    row_scale: Tensor,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    initial: Tensor | None,
    num_modalities: int,
    unit_keys: bool,
    eps: float,
    with_indicator: bool,
    with_gram: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """view_a = q W1_a^T + sum_{m != a} s_m (q W2_a^T) G^m, q G^m q^T / |q|^2, and the Gram after the last key."""
    chunks = _Chunks(key, key_modality, query.shape[2], initial, num_modalities, unit_keys, eps)
    rows, scale = chunks.cut_rows(query), chunks.cut_scale(row_scale)
    views = []
    for a in range(num_modalities):
        view = rows + rows @ b1[a].mT @ a1[a].mT
        moved = rows @ b2[a].mT @ a2[a].mT
        scores = chunks.scores(moved)
        for m in range(num_modalities):
            if m != a:
                view = view + chunks.project(moved, scores, m) * scale[..., m, None]
        views.append(view)
    empty = row_scale.new_empty(0)
    indicator = empty
    if with_indicator:
        scores = chunks.scores(rows)
        forms = [(chunks.project(rows, scores, m) * rows).sum(-1) for m in range(num_modalities)]
        square = rows.square().sum(-1, keepdim=True)
        absent = square == 0
        indicator = torch.stack(forms, dim=-1) * torch.where(absent, 0.0, 1.0 / square.masked_fill(absent, 1.0))
        indicator = chunks.join(indicator[None])[0]
    return chunks.join(torch.stack(views)).to(query.dtype), indicator, chunks.gram if with_gram else empty


class _Chunks:
    """Keys cut into chunks, the Gram before each, and rows cut to match: row i is at the place of key i + Nk - Nq."""

    def __init__(
        self,
        key: Tensor,
        modality: Tensor,
        num_rows: int,
        initial: Tensor | None,
        num_modalities: int,
        unit_keys: bool,
        eps: float,
    ) -> None:
        self.num_keys, self.num_rows = key.shape[2], num_rows
        self.filler = -self.num_keys % CHUNK
        features = key_features(key, modality, "l2" if unit_keys else None, eps)
        self.features = self._cut(features)  # (B, Hkv, n, C, D)
        modality = pad(modality, (0, self.filler), value=-1).unflatten(1, (-1, CHUNK))[:, None, ..., None]
        self.keys = [torch.where(modality == m, self.features, 0.0) for m in range(num_modalities)]
        sums = torch.stack([k.mT @ k for k in self.keys])  # (M, B, Hkv, n, D, D)
        if initial is None:
            initial = sums.new_zeros(*key.shape[:2], num_modalities, *sums.shape[4:])
        first = initial.movedim(2, 0).unsqueeze(3)
        states = torch.cat([first, sums], dim=3).cumsum(dim=3)
        self.before = states[:, :, :, :-1]
        self.gram = states[:, :, :, -1].movedim(0, 2)

    def _cut(self, tensor: Tensor) -> Tensor:
        """(..., Nk, X) -> (..., n, C, X)"""
        return pad(tensor, (0, 0, 0, self.filler)).unflatten(-2, (-1, CHUNK))

    def cut_rows(self, query: Tensor) -> Tensor:
        """(B, Hq, Nq, D) -> (B, Hkv, group, n, C, D) in the dtype of the sums."""
        query = query.to(self.features.dtype).unflatten(1, (self.features.shape[1], -1))
        return self._cut(pad(query, (0, 0, self.num_keys - self.num_rows, 0)))

    def cut_scale(self, scale: Tensor) -> Tensor:
        """(B, Hkv, Nq, M) -> (B, Hkv, 1, n, C, M)"""
        return self._cut(pad(scale, (0, 0, self.num_keys - self.num_rows, 0))).unsqueeze(2)

    def scores(self, rows: Tensor) -> Tensor:
        """(B, Hkv, group, n, C, C): rows against the keys of their own chunk up to themselves."""
        return (rows @ self.features.unsqueeze(2).mT).tril()

    def project(self, rows: Tensor, scores: Tensor, m: int) -> Tensor:
        """The rows times the raw Gram of modality m that each sees."""
        return rows @ self.before[m].unsqueeze(2) + scores @ self.keys[m].unsqueeze(2)

    def join(self, rows: Tensor) -> Tensor:
        """(..., Hkv, group, n, C, X) -> (..., Hq, Nq, X)"""
        rows = rows.flatten(-3, -2).flatten(-4, -3)
        return rows[..., self.num_keys - self.num_rows : self.num_keys, :]
