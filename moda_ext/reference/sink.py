"""The pseudo scores of MODA's mask, as a sum over each of them, and as StableMask writes them."""

import math

import torch
from torch import Tensor

from moda_ext.reference.common import raise_if_on_host

__all__ = [
    "pseudo_score_sink",
    "stable_mask_weights",
]


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
    """:func:`moda_ext.attention.pseudo_score_sink`, summed in float64; differentiable in ``decay`` and ``base``.

    c_i = base + log sum_{t=1}^{n-i} e^{-(t-1) decay}      with 1 / (1 - e^-decay) for the sum of infinitely many
    """
    given = [t for t in (decay, base) if isinstance(t, Tensor)]
    device = given[0].device if given else device
    decay, base = (  # (H, 1) or (1,)
        t.double()[..., None] if isinstance(t, Tensor) else torch.full((1,), t, dtype=torch.float64, device=device)
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
        sink = base - (1 - (-decay).exp()).log()
        return sink.expand(*sink.shape[:-1], num_rows).to(dtype)

    t = torch.arange(max(length, 1), device=decay.device)
    sums = torch.where(t == 0, 0.0, -t * decay).logcumsumexp(dim=-1)  # of the first t + 1 pseudo scores
    left = length - torch.arange(start + 1, start + num_rows + 1, device=decay.device)
    sink = base + sums[..., (left - 1).clamp(min=0)]
    return sink.masked_fill(left <= 0, -math.inf).to(dtype)


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
