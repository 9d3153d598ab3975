"""The pseudo scores of MODA's mask, summed up to a sink of every row: a closed form of N numbers, in plain PyTorch."""

import math

import torch
from torch import Tensor

from moda_ext._ops.limits import FLOATS, accumulation_dtype
from moda_ext.functional import checks


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
    r"""The pseudo scores of a causal row, summed: the ``sink`` that makes :func:`modular_attention` apply MODA's mask.

    Row i (1-based) of a sequence of maximal length n has n - i pseudo scores, which decay away from the diagonal:

    .. math::
        c_i = \log \sum_{t=1}^{n-i} e^{\text{base} - (t-1)\,\text{decay}}
            = \text{base} + \log(1 - e^{-\text{decay}\,(n-i)}) - \log(1 - e^{-\text{decay}})

    with the limit :math:`\text{base} + \log(n - i)` at decay 0, and -inf (no pseudo score left) for :math:`i \ge n`. A
    row's sink depends on its absolute position only, so decoding token by token agrees with training. ``base=-inf``
    switches pseudo scores off. Source: MODA, Eq. 9-10; StableMask, ICML 2024 (arXiv 2402.04779).

    Args:
        num_rows: number of rows.
        length: n, or None for an infinite one, where the sink is the same for every row and decay must be above 0.
        decay: decay per position, at least 0; a number or a floating-point tensor of shape (H,) or ().
        base: the first pseudo score; a number or a floating-point tensor of shape (H,) or ().
        start: 0-based absolute position of the first row: row r of the result is i = start + r + 1.
        device: device of the result, by default that of ``decay`` or ``base``, else the default device.
        dtype: dtype of the result. It is computed in float64 if ``dtype`` is float64, else in float32.

    Returns:
        (H, num_rows) if ``decay`` or ``base`` has shape (H,), else (num_rows,). Differentiable in ``decay`` and
        ``base``.

    Raises:
        ValueError: a negative number of rows, length, start or decay; decay 0 with an infinite length (for tensors: on
            the CPU); shapes or devices that do not fit.
        TypeError: an argument of another type or dtype.
        NotImplementedError: no kernel for this device.

    Example:
        >>> sink = pseudo_score_sink(5, 6, torch.tensor([0.5, 1.0]))  # two heads, five rows, at most six tokens
        >>> sink.shape, sink[:, -1]  # the last row has one pseudo score left, exp(0)
        (torch.Size([2, 5]), tensor([0., 0.]))
    """
    check_sink(num_rows, length, decay, base, start, device, dtype)
    work = accumulation_dtype(dtype)
    given = [t for t in (decay, base) if isinstance(t, Tensor)]
    device = given[0].device if given else device
    decay, base = (  # (H, 1) or (1,)
        t.to(work)[..., None] if isinstance(t, Tensor) else torch.full((1,), t, dtype=work, device=device)
        for t in (decay, base)
    )
    checks.on_host(
        ~(decay >= 0), "pseudo_score_sink: decay must be at least 0, got a tensor with a smaller value or NaN"
    )
    if length is None:
        checks.on_host(
            decay == 0,
            "pseudo_score_sink: decay must be above 0 when length is None, or the sum of pseudo scores is infinite",
        )
        sink = base - (-torch.expm1(-decay)).log()
        return sink.expand(*sink.shape[:-1], num_rows).to(dtype)
    left = length - start - torch.arange(1, num_rows + 1, device=decay.device)
    return sink_of_left(left, decay, base).to(dtype)


def sink_of_left(left: Tensor, decay: Tensor, base: Tensor) -> Tensor:
    r"""The sink of rows with ``left`` pseudo scores (integers, any shape), -inf where none is left; differentiable.

    .. math::
        c = \text{base} + \log\frac{1 - e^{-x}}{1 - e^{-\text{decay}}}, \qquad x = \text{decay} \cdot \text{left}

    and for small x its series, base + log(left) - (x - decay) / 2 + (x^2 - decay^2) / 24, whose remainder is below
    x^4 / 2880. That holds at decay = 0 as well, with the right derivative, -(left - 1) / 2.
    """
    none_left = left <= 0
    left = left.clamp(min=1).to(decay.dtype)
    x = decay * left
    small = x < 1e-2
    series = left.log() - (x - decay) / 2 + (x.square() - decay.square()) / 24
    x, decay = x.masked_fill(small, 1.0), decay.expand_as(x).masked_fill(small, 1.0)  # no 0 / 0, also in the gradient
    sink = base + torch.where(small, series, (torch.expm1(-x) / torch.expm1(-decay)).log())
    return sink.masked_fill(none_left, -math.inf)


def check_sink(
    num_rows: int,
    length: int | None,
    decay: float | Tensor,
    base: float | Tensor,
    start: int,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> None:
    """Raise unless ``pseudo_score_sink`` can run these arguments."""
    op = "pseudo_score_sink"
    checks.count(op, "num_rows", num_rows)
    checks.count(op, "start", start)
    if length is not None:
        checks.count(op, "length", length)
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be one of {checks.names(FLOATS)}, got {dtype}")
    for name, argument in (("decay", decay), ("base", base)):
        if not isinstance(argument, Tensor):
            if not checks.is_number(argument):
                raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(argument).__name__}")
            if name == "base" and not argument < math.inf:  # also NaN
                raise ValueError(f"{op}: base must be a number below infinity, got {argument}")
            continue
        checks.dtype(op, name, argument, FLOATS)
        if argument.dim() > 1:
            raise ValueError(f"{op}: {name} must be a scalar or have shape (H,), got shape {tuple(argument.shape)}")
        if device is not None and not checks.same_device(argument.device, torch.device(device)):
            raise ValueError(f"{op}: {name} must be on the device asked for ({device}), got {argument.device}")
    if isinstance(decay, Tensor) and isinstance(base, Tensor):
        checks.device(op, "base", base, decay, "decay")
        if decay.dim() == base.dim() == 1 and decay.shape[0] != base.shape[0] and 1 not in (*decay.shape, *base.shape):
            checks.mismatch(op, "base", "as many heads as decay", decay.shape[0], base.shape[0])
    if not isinstance(decay, Tensor):
        if not decay >= 0:  # also NaN
            raise ValueError(f"{op}: decay must be at least 0, got {decay}")
        if length is None and decay == 0:
            raise ValueError(
                f"{op}: decay must be above 0 when length is None, or the sum of pseudo scores is infinite; got {decay}"
            )
