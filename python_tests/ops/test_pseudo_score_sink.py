"""The closed form of the pseudo scores' sum, against the sum itself in float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moda_ext import attention, reference


def series(num_rows: int, length: int, decay: float, base: float = 0.0, start: int = 0) -> torch.Tensor:
    """Row i sums exp(base - (t - 1) decay) over t = 1 .. length - i, term by term."""
    rows = []
    for i in range(start + 1, start + num_rows + 1):
        t = torch.arange(max(length - i, 0), dtype=torch.float64)
        rows.append(torch.logsumexp(base - t * decay, 0) if len(t) else torch.tensor(-math.inf, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)


DECAYS = st.one_of(
    st.sampled_from((0.0, 1e-30, 1e-12, 1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 0.5, 1.0, 40.0, 1e4)), st.floats(0, 5)
)


@settings(max_examples=100)
@given(
    num_rows=st.integers(0, 40),
    length=st.integers(0, 300),
    start=st.integers(0, 300),
    decay=DECAYS,
    base=st.sampled_from((0.0, -10.0, 2.5)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_closed_form_equals_the_sum(device, num_rows, length, start, decay, base, dtype):
    expected = series(num_rows, length, decay, base, start)
    tolerance = {"atol": 1e-11, "rtol": 1e-11} if dtype == torch.float64 else {"atol": 2e-6, "rtol": 2e-6}
    for function in (attention.pseudo_score_sink, reference.pseudo_score_sink):
        sink = function(num_rows, length, decay, base=base, start=start, device=device, dtype=dtype)
        torch.testing.assert_close(sink.cpu().double(), expected, **tolerance)


@settings(max_examples=150)
@given(decay=DECAYS, length=st.integers(1, 300), start=st.integers(0, 20), seed=st.integers(0, 100))
def test_gradients_equal_those_of_the_sum(device, decay, length, start, seed):
    weight = torch.randn(25, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    decay_leaf = torch.tensor([decay], dtype=torch.float64, device=device, requires_grad=True)
    base_leaf = torch.tensor([0.3], dtype=torch.float64, device=device, requires_grad=True)
    # d log(sum e^(-t decay)) / d decay = - mean of t under the softmax
    expected_decay = expected_base = 0.0
    for row in range(25):
        t = torch.arange(max(length - (start + row + 1), 0), dtype=torch.float64)
        if len(t):
            expected_decay -= float(weight[row] * (torch.softmax(-t * decay, 0) * t).sum())
            expected_base += float(weight[row])
    for function in (attention.pseudo_score_sink, reference.pseudo_score_sink):
        sink = function(25, length, decay_leaf, base=base_leaf, start=start, dtype=torch.float64)
        finite = torch.where(sink.isfinite(), sink, 0.0)
        grads = torch.autograd.grad((finite * weight.to(device)).sum(), (decay_leaf, base_leaf))
        assert grads[0].item() == pytest.approx(expected_decay, rel=1e-7, abs=1e-7)
        assert grads[1].item() == pytest.approx(expected_base, rel=1e-9, abs=1e-9)


def test_finite_differences(device):
    decay = torch.tensor([0.5, 0.01, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    base = torch.tensor([0.0, -1.0, 0.7], dtype=torch.float64, device=device, requires_grad=True)
    for length in (9, None):
        assert torch.autograd.gradcheck(
            lambda d, b, n=length: attention.pseudo_score_sink(6, n, d, base=b, start=1, dtype=torch.float64),
            (decay, base),
        )


def test_infinite_length_is_the_limit_of_long_ones(device):
    decay = torch.tensor([0.5, 1.0, 50.0], device=device)
    infinite = attention.pseudo_score_sink(4, None, decay, base=-1.0)
    torch.testing.assert_close(infinite, attention.pseudo_score_sink(4, 10**6, decay, base=-1.0))
    assert (infinite == infinite[:, :1]).all()


def test_row_n_and_beyond_have_no_pseudo_score(device):
    sink = attention.pseudo_score_sink(5, 3, 0.5, device=device)
    assert sink[:2].isfinite().all()
    assert (sink[2:] == -math.inf).all()  # 1-based rows 3, 4, 5
    assert sink[1].item() == 0.0  # one pseudo score is left, exp(0)


def test_base_of_minus_infinity_switches_off(device):
    for length in (10, None):
        assert (attention.pseudo_score_sink(4, length, 0.5, base=-math.inf, device=device) == -math.inf).all()
    base = torch.tensor([-math.inf, 0.0], device=device)
    sink = attention.pseudo_score_sink(4, 10, 0.5, base=base)
    assert (sink[0] == -math.inf).all()
    assert sink[1].isfinite().all()


@pytest.mark.parametrize(
    ("decay", "base", "shape"),
    [
        (0.5, 0.0, (4,)),
        (torch.tensor(0.5), 0.0, (4,)),
        (torch.full((3,), 0.5), 0.0, (3, 4)),
        (0.5, torch.zeros(3), (3, 4)),
        (torch.full((3,), 0.5), torch.zeros(3), (3, 4)),
        (torch.full((3,), 0.5), torch.zeros(()), (3, 4)),
        (torch.full((3,), 0.5), torch.zeros(1), (3, 4)),
        (torch.zeros(0), 0.0, (0, 4)),
    ],
)
def test_shapes(device, decay, base, shape):
    decay, base = (t.to(device) if isinstance(t, torch.Tensor) else t for t in (decay, base))
    for function in (attention.pseudo_score_sink, reference.pseudo_score_sink):
        assert function(4, 9, decay, base=base, device=device).shape == shape


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_dtype_and_device_of_the_result(device, dtype):
    sink = attention.pseudo_score_sink(4, 9, torch.full((2,), 0.5, device=device), dtype=dtype)
    assert sink.dtype == dtype
    assert sink.device.type == device
    assert attention.pseudo_score_sink(4, 9, 0.5).dtype == torch.float32
    exact = attention.pseudo_score_sink(4, 9, 0.5, dtype=torch.float64, device=device)
    torch.testing.assert_close(sink[0].double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_rows_do_not_depend_on_where_a_call_starts(device):
    whole = attention.pseudo_score_sink(20, 30, 0.3, device=device)
    parts = [attention.pseudo_score_sink(5, 30, 0.3, start=s, device=device) for s in range(0, 20, 5)]
    assert torch.equal(torch.cat(parts), whole)
