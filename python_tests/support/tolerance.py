"""The tolerance rule of every numerical test, in one place."""

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
    return 2 * max(finite_max(way.detach().cpu().double() - oracle) for way in ways) + 2 * rounding + slack


def assert_within_rule(
    name: str, result: Tensor, oracle: Tensor, dense: Tensor | list[Tensor], magnitude: float = 0.0, part: float = 1.0
) -> None:
    """``result`` has the oracle's shape and infinities, is finite elsewhere, and obeys the rule of allowed_error.

    ``part``: of the allowed error, that may be taken.
    """
    oracle = oracle.detach().cpu()
    dtype, result = result.dtype, result.detach().cpu().double()
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    assert not result.isnan().any(), f"{name}: NaN at {result.isnan().nonzero()[:5].tolist()}"
    infinite = oracle.isinf()
    assert torch.equal(result.isinf(), infinite), f"{name}: infinities differ"
    assert torch.equal(result[infinite], oracle[infinite]), f"{name}: infinities differ in sign"
    if result.numel() == 0:
        return
    difference = (result - oracle).nan_to_num().abs()  # inf - inf is an infinity both agree on
    error, where = difference.max().item(), difference.argmax()
    index = tuple(int(i) for i in torch.unravel_index(where, difference.shape))
    allowed = part * allowed_error(oracle, dense, dtype, magnitude)
    assert error <= allowed, f"{name}: error {error:.3g} at {index}, allowed {allowed:.3g}"


def finite_max(tensor: Tensor) -> float:
    """Largest absolute value of the finite elements, 0 if there is none."""
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_close(result: Tensor, expected: Tensor, units: float = 128.0) -> None:
    """Two ways to compute the same thing agree within ``units`` roundings of the largest number."""
    expected = expected.detach().to(result.dtype)
    eps = torch.finfo(result.dtype).eps
    atol = units * eps * max(1.0, finite_max(expected))
    torch.testing.assert_close(result.detach(), expected, atol=atol, rtol=0.0)
