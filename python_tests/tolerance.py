"""The tolerance rule of every numerical test, in one place."""

import math

import torch
from torch import Tensor


def allowed_error(oracle: Tensor, dense: Tensor, dtype: torch.dtype, rounding_units: float = 0.0) -> float:
    """How far (max norm) a result in ``dtype`` may be from the float64 ``oracle``.

        2 max|dense - oracle| + 2 max|(oracle + 0.3 - 0.3) - oracle|

    ``dense`` is the same mathematics done densely by PyTorch in the low precision, and the second term is the rounding
    unit. The rule presumes tensors large enough for their maxima to be typical: with a handful of numbers the dense way
    may hit the oracle by luck. Fuzzed tests, which have such tensors, add ``rounding_units`` roundings of the largest
    number. In float64 dense and oracle are the same computation; there the bound is 1e-11 of the largest number.
    """
    largest = finite_max(oracle)
    if dtype == torch.float64:
        return 1e-11 * max(1.0, largest)
    rounded = oracle.to(dtype)
    rounding = finite_max((rounded + 0.3 - 0.3).double() - rounded.double())
    slack = rounding_units * torch.finfo(dtype).eps * max(1.0, largest)
    return 2 * finite_max(dense.double() - oracle) + 2 * rounding + slack


def assert_within_rule(name: str, result: Tensor, oracle: Tensor, dense: Tensor, rounding_units: float = 0.0) -> None:
    """``result`` has the oracle's shape and infinities, is finite elsewhere, and obeys the rule of allowed_error."""
    oracle, dense = oracle.detach().cpu(), dense.detach().cpu()
    dtype, result = result.dtype, result.detach().cpu().double()
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    assert not result.isnan().any(), f"{name}: NaN at {result.isnan().nonzero()[:5].tolist()}"
    infinite = oracle.isinf()
    assert torch.equal(result.isinf(), infinite), f"{name}: infinities differ"
    assert torch.equal(result[infinite], oracle[infinite]), f"{name}: infinities differ in sign"
    if result.numel() == 0:
        return
    error = finite_max(result - oracle)
    allowed = allowed_error(oracle, dense, dtype, rounding_units)
    where = (result - oracle).nan_to_num().abs().argmax().item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), result.shape))
    assert error <= allowed, f"{name}: error {error:.3g} at {index}, allowed {allowed:.3g}"


def finite_max(tensor: Tensor) -> float:
    """Largest absolute value of the finite elements, 0 if there is none (inf - inf is an infinity both agree on)."""
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_close(result: Tensor, expected: Tensor, units: float = 64.0) -> None:
    """Two ways to compute the same thing agree within ``units`` roundings of the largest number."""
    expected = expected.detach().to(result.dtype)
    eps = torch.finfo(result.dtype).eps
    atol = units * eps * max(1.0, finite_max(expected))
    assert math.isfinite(atol)
    torch.testing.assert_close(result.detach(), expected, atol=atol, rtol=0.0)
