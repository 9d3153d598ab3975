"""The tolerance rule of the project, in one place: how far a result may be from the float64 oracle."""

import math

import torch
from torch import Tensor


def allowed_error(oracle: Tensor, dense: Tensor | list[Tensor], dtype: torch.dtype, magnitude: float = 0.0) -> float:
    """How far (max norm) a result in ``dtype`` may be from the float64 ``oracle``.

        2 max|dense - oracle| + 2 max|(oracle + 0.3 - 0.3) - oracle|

    ``dense`` is the same mathematics done densely by PyTorch in the low precision, and the second term is the rounding
    unit. Several ways to do it densely (a list) count by the least accurate: one way's largest error is a matter of
    luck, and of the machine's matrix products. The rule presumes tensors large enough for their maxima to be typical:
    with a handful of numbers the dense way hits the oracle by luck. Fuzzed tests, which have such tensors, pass the
    ``magnitude`` of the numbers that go in and are granted 16 float32 roundings of it, and one rounding of the largest
    result. In float64 oracle and dense are the same computation; there the bound is 1e-11 of the largest number.
    """
    largest = finite_max(oracle)
    if dtype == torch.float64:
        return 1e-11 * max(1.0, largest, magnitude)
    ways = dense if isinstance(dense, list) else [dense]
    rounded = oracle.to(dtype)
    rounding = finite_max((rounded + 0.3 - 0.3).double() - rounded.double())
    slack = 16 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * largest if magnitude else 0.0
    return 2 * max(finite_max(way.detach().to(oracle) - oracle) for way in ways) + 2 * rounding + slack


def finite_max(tensor: Tensor) -> float:
    """Largest absolute value of the finite elements, 0 if there is none."""
    if tensor.numel() == 0:
        return 0.0
    largest = tensor.abs().max().item()
    if math.isfinite(largest):
        return largest
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
