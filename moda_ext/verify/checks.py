"""The checks of one case: right, the same each time, and, on a GPU, in graphs and on streams. ``None``: passed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moda_ext._ops.backend import use_backend
from moda_ext._ops.limits import accumulation_dtype
from moda_ext.verify.cases import Call, Case, Results
from moda_ext.verify.rule import allowed_error, finite_max

REPEATS = 5


class Error(NamedTuple):
    """``part``: the error over what the rule allows, of the result where that is largest."""

    result: str
    part: float
    error: float


def evaluate(call: Call, inputs: dict[str, Tensor]) -> Results:
    """All results, and for a fixed cotangent of all, exact in every dtype, the gradient of every input that asks."""
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    with torch.set_grad_enabled(bool(wanted)):
        results = call(**leaves)
    made = {name: result.detach() for name, result in results.items()}
    if wanted:
        outputs = [result for result in results.values() if result.requires_grad]
        cotangents = [_cotangent(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, materialize_grads=True)
        made |= {f"gradient of {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return made


def _cotangent(result: Tensor) -> Tensor:
    numbers = torch.arange(result.numel(), device=result.device) * 5 % 7 - 3
    return (numbers / 4).to(result.dtype).view(result.shape)


def ours(case: Case, inputs: dict[str, Tensor]) -> Results:
    with use_backend("native"):
        return evaluate(case.ours, inputs)


def error_of(case: Case, device: torch.device, *, poison: bool = True) -> Error:
    """Of the native operator, by the tolerance rule. NaN and misplaced infinities are an infinite error.

    With ``poison`` memory that nobody wrote is NaN, so that it shows where it gets into a result.
    """
    inputs = case.inputs(device)
    with poisoned_memory() if poison else contextlib.nullcontext():
        found = ours(case, inputs)
    sums = accumulation_dtype(case.dtype)
    with one_thread():
        oracle = evaluate(case.dense, _cast(inputs, torch.float64))
        with RoundedProducts():
            near = evaluate(case.dense, inputs)
        if sums != case.dtype:
            near |= {n: r for n, r in evaluate(case.dense, _cast(inputs, sums)).items() if n in case.wide}
    largest = max(1.0, *(finite_max(t.detach()) for t in inputs.values() if t.is_floating_point()))
    scores = max(1.0, finite_max(oracle["lse"])) if "lse" in oracle else 1.0
    worst = Error("", 0.0, 0.0)
    for name, expected in oracle.items():
        result = found[name]
        if result.shape != expected.shape:
            return Error(f"{name}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}", float("inf"), 0.0)
        if result.numel() == 0:
            continue
        difference = (result.double() - expected).abs()
        difference = torch.where(result.double() == expected, 0.0, difference)  # infinities that both have
        error = difference.max().item()
        magnitude = largest * max(scores, finite_max(expected))
        dtype = sums if name in case.wide else case.dtype
        part = error / allowed_error(expected, near[name], dtype, magnitude)
        part = part if part == part else float("inf")
        if part >= worst.part:
            worst = Error(name, part, error)
    return worst


def changes_when_repeated(case: Case, device: torch.device) -> str | None:
    """Which result is not the same, to the bit, in every one of some calls, the last of them without gradients."""
    inputs = case.inputs(device)
    first = ours(case, inputs)
    for call in range(1, REPEATS):
        asked = inputs if call < REPEATS - 1 else {name: t.detach() for name, t in inputs.items()}
        for name, result in ours(case, asked).items():
            if not torch.equal(result, first[name]):
                return name
    return None


# On a GPU -------------------------------------------------------------------------------------------------------------


def fails_in_a_graph(case: Case, device: torch.device) -> str | None:
    """Forward and backward captured, the inputs overwritten, the graph replayed: it must compute anew."""
    inputs, fresh = case.inputs(device, 0), case.inputs(device, 1)
    on_side_stream(lambda: ours(case, inputs))  # what happens only once, as loading a kernel, cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(case, inputs)
    expected = ours(case, fresh)
    _overwrite(inputs, fresh)
    graph.replay()
    return differs(captured, expected)


def fails_on_two_streams(case: Case, device: torch.device) -> str | None:
    """Inputs arrive late, on the stream of the call: whoever runs on another stream, or shares scratch, is wrong."""
    sources = [case.inputs(device, seed) for seed in range(2)]
    expected = [ours(case, source) for source in sources]
    late = [{n: _blank(t) for n, t in source.items()} for source in sources]
    streams = [torch.cuda.Stream(device) for _ in sources]
    found: list[list[Results]] = [[], []]
    torch.cuda.synchronize(device)
    for _ in range(3):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(5_000_000)
                _overwrite(late[i], sources[i])
                found[i].append(ours(case, late[i]))
    torch.cuda.synchronize(device)
    for i, runs in enumerate(found):
        for results in runs:
            if (name := differs(results, expected[i])) is not None:
                return name
    return None


def waits_for_the_device(case: Case, device: torch.device) -> str | None:
    """Whether the call comes back only after the work before it is done."""
    inputs = case.inputs(device)
    ours(case, inputs)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1_000_000_000)
    slept = torch.cuda.Event()
    slept.record()
    ours(case, inputs)
    waited = slept.query()
    torch.cuda.synchronize(device)
    return "the call waited for the work before it" if waited else None


def on_side_stream(call: Callable[[], object]) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)


def differs(found: Results, expected: Results) -> str | None:
    """Which result is off by more than a few roundings of its largest number: libraries sum in another order."""
    for name, result in found.items():
        other = expected[name].to(result.device)
        roundings = 128 if result.dtype in (torch.float32, torch.float64) else 4
        difference = torch.where(result == other, 0.0, (result - other).abs())
        if not difference.max() <= roundings * torch.finfo(result.dtype).eps * finite_max(other):
            return name
    return None


def _blank(tensor: Tensor) -> Tensor:
    blank = torch.zeros_like(tensor) if tensor.is_floating_point() else tensor.clone()
    return blank.requires_grad_(tensor.requires_grad)


def _overwrite(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])


def _cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small calls of PyTorch: threads that wait for each other would cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, in what judges ours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RoundedProducts(TorchDispatchMode):
    """Products of low-precision matrices on a CPU: in float32, rounded once. PyTorch's own may be 300 times as slow."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        low = function in PRODUCTS and args[0].dtype in (torch.bfloat16, torch.float16) and args[0].is_cpu
        return function(*(t.float() for t in args)).to(args[0].dtype) if low else function(*args, **(kwargs or {}))


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN (integers: the largest), so a result nobody wrote, or scratch nobody set, shows."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")  # of operators of PyTorch beside ours
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled
