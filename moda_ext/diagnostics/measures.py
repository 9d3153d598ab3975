r"""The formulas of the diagnosis, as functions of sums over visible pairs: no N x N matrix, no model.

A *pair* (i, j) is a query row i and a key j that it sees; a is the modality of the row, m that of the key. Everything
is made of three sums over rows, for each layer:

- **flow** (..., M, M): :math:`\sum_{i: a_i = a} \text{mass}_{im}`, the attention weight that went from rows of a to
  keys of m. The leading dimensions are heads or layers;
- **pairs** (..., M, M): the number of such pairs, :math:`\sum_{i: a_i = a} n_{im}`, with :math:`n_{im}` the number of
  visible keys of modality m (:func:`key_counts`);
- **rows** (..., M): the number of rows of each modality.

For MDI and AEI as published the rows are those of generated tokens, the keys those of their prompts, and the flow is
made of :func:`prompt_shares`.

A figure that has no pair to speak of (the vision rows of an image-first causal layout see no text) is NaN, never 0.
All functions accept any floating-point dtype and device, are differentiable, and raise nothing that torch does not
raise. Source: MODA (arXiv 2507.04635), section 3.2, Fig. 2; the paper prints no formula, these are this project's
reading of it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_ext.integrations.recording import key_counts

__all__ = [
    "attention_efficiency",
    "average_difference",
    "choose_rows",
    "cross_weight",
    "decay_slope",
    "disparity",
    "dominance_index",
    "key_counts",
    "mean_mass",
    "pair_weight",
    "per_token_score",
    "prompt_shares",
    "rows_that_see_all",
    "self_weight",
    "split_in_thirds",
    "sum_rows",
    "token_similarity",
    "uniform_mass",
]

NORMALIZERS = ("max", "sum", "self")


def uniform_mass(counts: Tensor) -> Tensor:
    """The null: the mass that uniform attention over the visible keys gives to each modality.

    Args:
        counts: (..., M), the number of visible keys of each modality.

    Returns:
        (..., M), in float32 or the floating-point dtype of ``counts``; 0 for a row that sees nothing.
    """
    counts = counts if counts.is_floating_point() else counts.to(torch.float32)
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def rows_that_see_all(counts: Tensor, key_modality: Tensor) -> Tensor:
    """The rows that see every modality of their sequence, of which there are at least two.

    Rows before an image see text only. Their weights say how few keys they see, not what the model prefers.

    Args:
        counts: (B, Nq, M), see :func:`key_counts`.
        key_modality: (B, Nk), integer.

    Returns:
        (B, Nq), bool.
    """
    present = _members(key_modality, counts.shape[-1]).any(dim=1)[:, None]  # (B, 1, M)
    return ((counts > 0) | ~present).all(dim=-1) & (present.sum(dim=-1) > 1)


def choose_rows(query_modality: Tensor, num_modalities: int, rows: Tensor | None = None) -> Tensor:
    """Which rows are of which modality, for :func:`sum_rows`.

    Args:
        query_modality: (B, Nq), integer in [0, M), or -1 for rows to leave out.
        num_modalities: M.
        rows: (B, Nq), bool: the rows to count; None is all.

    Returns:
        (B, Nq, M), bool.
    """
    chosen = _members(query_modality, num_modalities)
    return chosen if rows is None else chosen & rows[..., None]


def sum_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Sums over the batch and the chosen rows.

    Args:
        values: (B, ..., Nq, K), floating point: the mass (K = M), the counts, or a column.
        chosen: (B, Nq, C), see :func:`choose_rows`: C choices of rows.

    Returns:
        (..., C, K), in the dtype of ``values``.
    """
    rest = values.shape[1:-2]
    columns = values.movedim(-2, 1).flatten(2).flatten(0, 1)  # (B Nq, ... K): one product for all
    columns = columns.masked_fill(~chosen.any(dim=-1).flatten()[:, None], 0)  # rows of padding may hold NaN
    sums = chosen.to(values.dtype).flatten(0, 1).T @ columns
    return sums.reshape(chosen.shape[-1], *rest, values.shape[-1]).movedim(0, -2)


def pair_weight(flow: Tensor, pairs: Tensor) -> Tensor:
    """The mean attention weight of a pair (i, j) by modalities, (..., M, M): flow / pairs, NaN without pairs."""
    return torch.where(pairs > 0, flow / pairs.clamp(min=1), torch.nan)


def self_weight(flow: Tensor, pairs: Tensor) -> Tensor:
    """:math:`s_m`, (..., M): the mean weight of the pairs within modality m."""
    return pair_weight(flow, pairs).diagonal(dim1=-2, dim2=-1)


def cross_weight(flow: Tensor, pairs: Tensor) -> Tensor:
    """:math:`c_m`, (..., M): the mean weight of the pairs from a row of modality m to a key of any other modality."""
    return pair_weight(_off_diagonal_sum(flow), _off_diagonal_sum(pairs))


def disparity(self_weight: Tensor, cross_weight: Tensor, normalizer: str = "max") -> Tensor:
    r"""How far self and cross weights are apart: :math:`|s_m - c_m| / \max(s_m, c_m)`, from 0 (alike) to 1.

    Args:
        self_weight, cross_weight: of the same shape.
        normalizer: what the difference is divided by. ``"max"``: the larger weight; ``"sum"``: :math:`s_m + c_m`;
            ``"self"``: :math:`s_m` (not bounded by 1).

    Raises:
        ValueError: an unknown normalizer.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"disparity: normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    scale = {
        "max": torch.maximum(self_weight, cross_weight),
        "sum": self_weight + cross_weight,
        "self": self_weight,
    }[normalizer]
    return (self_weight - cross_weight).abs() / scale


def average_difference(self_weight: Tensor, cross_weight: Tensor, normalizer: str = "max") -> Tensor:
    r"""AvgDiff: the mean :func:`disparity` over layers.

    The paper prints, for text and vision, 56.97 % and 62.44 % for its baseline, 50.31 % and 41.01 % with MODA.

    Args:
        self_weight, cross_weight: (L, ..., M). A layer where one is not defined (NaN) makes the result NaN.
        normalizer: see :func:`disparity`.

    Returns:
        (..., M), a fraction (not percent).
    """
    return disparity(self_weight, cross_weight, normalizer).mean(dim=0)


def per_token_score(flow: Tensor, pairs: Tensor) -> Tensor:
    """:math:`r_m`, (..., M): the mean weight that a key of modality m receives from a row that sees it (Fig. 2a)."""
    return pair_weight(flow.sum(dim=-2), pairs.sum(dim=-2))


def mean_mass(flow: Tensor, rows: Tensor) -> Tensor:
    """(..., M, M): the share of a row's attention, over all keys of modality m, mean over the rows of modality a.

    A row of the result sums to 1 minus the sink's share.
    """
    return pair_weight(flow, rows[..., None])


def dominance_index(flow: Tensor, pairs: Tensor) -> Tensor:
    r"""MDI, the modality dominance index: weight of a text key over weight of a key of modality m, seen from text.

    .. math:: \text{MDI}_m = w_{0 0} / w_{0 m}

    with w the mean weight of a pair (:func:`pair_weight`) and modality 0 the text. Above 1, a text token gets more
    attention than a token of modality m. Of rows that see n_0 text tokens and n_m of modality m, with attention A in
    all, this is :math:`(A_0 / n_0) / (A_m / n_m)`, the formula of Wu et al. (arXiv 2508.10552). They take the generated
    tokens as rows and the prompt's tokens as keys (:func:`prompt_shares`); here the rows are those of the sums.

    Returns:
        (..., M); 1 for the text itself.
    """
    weight = pair_weight(flow, pairs)[..., 0, :]
    return weight[..., :1] / weight


def attention_efficiency(flow: Tensor, pairs: Tensor) -> Tensor:
    r"""AEI, the attention efficiency index: the share of attention over the share of tokens, seen from text.

    .. math:: \text{AEI}_m = \frac{A_{0 m} / \sum_{m'} A_{0 m'}}{n_{0 m} / \sum_{m'} n_{0 m'}}

    with A the ``flow`` and n the ``pairs``. Above 1, modality m gets more attention than its tokens are many. Source
    and rows are those of :func:`dominance_index`, and :math:`\text{MDI}_m = \text{AEI}_0 / \text{AEI}_m`.

    Returns:
        (..., M); NaN for a modality without pairs.
    """
    flow, pairs = flow[..., 0, :], pairs[..., 0, :]
    return pair_weight(flow, pairs) / pair_weight(flow.sum(dim=-1, keepdim=True), pairs.sum(dim=-1, keepdim=True))


def prompt_shares(mass: Tensor, total: Tensor | None = None) -> Tensor:
    r"""Attention to the prompt, with rows normalised over the prompt's keys.

    .. math:: \hat A_{him} = A_{him} \Big/ \tfrac{1}{H} \textstyle\sum_{h'} \sum_{m'} A_{h'im'}

    The mean over heads of a row sums to 1: it is the row of the mean attention matrix of all heads, normalised, as
    published with MDI (arXiv 2508.10552).

    Args:
        mass: (..., H, N, M): what row i gives to the prompt's keys of modality m.
        total: (..., 1, N, 1): the divisor, where these are not all heads.

    Returns:
        Of the same shape; 0 in a row that gives the prompt nothing.
    """
    total = mass.sum(dim=-1, keepdim=True).mean(dim=-3, keepdim=True) if total is None else total
    return torch.where(total == 0, 0.0, mass / total)


def split_in_thirds(layers: int) -> list[slice]:
    """Early, middle and late layers: the borders are a third and two thirds of the layers, rounded.

    Of 32 layers 11, 10 and 11; with fewer than three layers some third is empty.
    """
    borders = [round(third * layers / 3) for third in range(4)]
    return [slice(*pair) for pair in itertools.pairwise(borders)]


def decay_slope(cross_weight: Tensor) -> Tensor:
    r"""The slope of :math:`\log c_m` against depth, by least squares: the premise of the paper's Eq. 4.

    Args:
        cross_weight: (L, ..., M), layers in order.

    Returns:
        (..., M), natural logarithm per layer; negative when cross-modal attention decays with depth. NaN with fewer
        than two layers, or where a layer's weight is 0 or not defined.
    """
    layers = cross_weight.shape[0]
    if layers < 2:
        return torch.full_like(cross_weight.sum(dim=0), torch.nan)
    depth = torch.arange(layers, dtype=cross_weight.dtype, device=cross_weight.device)
    depth = (depth - depth.mean()).reshape(-1, *[1] * (cross_weight.dim() - 1))
    slope = (depth * cross_weight.log()).sum(dim=0) / depth.square().sum()
    return torch.where(slope.isfinite(), slope, torch.nan)


def token_similarity(hidden: Tensor, chosen: Tensor) -> Tensor:
    r"""Attention collapse: the mean cosine similarity of two different tokens of a sequence.

    With unit rows :math:`\hat h_i`, :math:`\sum_{i \ne j} \hat h_i \hat h_j^T = \|\sum_i \hat h_i\|^2 - n`: no N x N
    matrix is needed.

    Args:
        hidden: (B, N, E), floating point.
        chosen: (B, N), bool: the tokens that count.

    Returns:
        (B,), in at least float32; NaN for fewer than two tokens.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    unit = F.normalize(hidden.to(dtype).masked_fill(~chosen[..., None], 0), dim=-1)
    n = chosen.sum(dim=1).to(dtype)
    total = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    return torch.where(n > 1, total / (n * (n - 1)).clamp(min=1), torch.nan)


def _members(modality: Tensor, num_modalities: int) -> Tensor:
    """(..., N, M), bool: whether a token is of modality m; -1 is of none."""
    return modality[..., None] == torch.arange(num_modalities, device=modality.device)


def _off_diagonal_sum(values: Tensor) -> Tensor:
    """(..., M, M) -> (..., M): the sum of each row without the diagonal."""
    eye = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return values.masked_fill(eye, 0).sum(dim=-1)
