"""What numerical tests assert: the tolerance rule (moda_ext.verify.rule), and that two ways agree."""

import torch
from torch import Tensor

from moda_ext.verify.rule import allowed_error, finite_max


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


def assert_close(result: Tensor, expected: Tensor, units: float = 128.0) -> None:
    """Two ways to compute the same thing agree within ``units`` roundings of the largest number."""
    expected = expected.detach().to(result.dtype)
    eps = torch.finfo(result.dtype).eps
    atol = units * eps * max(1.0, finite_max(expected))
    torch.testing.assert_close(result.detach(), expected, atol=atol, rtol=0.0)
