"""The correctness gate: the float64 reference on the same inputs, on a sample of rows, before anything is timed.

Rows of attention and of the causal aligner do not depend on one another, so a block of rows [s, e) with the keys it can
see is a whole problem for the dense reference, and small. For gradients the incoming gradient is zero outside the
sampled rows; then the gradients of key, value and weights, which sum over rows, are those of the sampled rows alone.
The contender runs at full size. Of a batch, the first sample and the last are compared. Contenders that are not
``by_rows`` are compared at full size.

Bound: |x - ref| <= 2 |low - ref| + 2 |(ref + 0.3 - 0.3) - ref| in max norm, ``low`` being dense PyTorch in the
contender's own dtype; for lse and mass of ours in float32, which they are for low-precision inputs too. In float32 its
largest error is a matter of luck (by a factor of two in small cases): it is the worst of several runs, all but the
first on inputs that are off by up to half a rounding. Ours has to keep the bound. What is ten times further off
computes something else and is not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .peers import Call, Contender
from .timing import callable_for
from .workloads import Case, Inputs, make_inputs

BLOCK_ROWS = 64
WRONG_FACTOR = 10.0
FEW = 4096  # so few numbers may be exact by luck in the dense way: they get 8 more roundings of their largest
NUDGED_RUNS = 3  # of the dense way in float32
LOW_PRECISION = (torch.bfloat16, torch.float16)
WIDE = ("lse", "mass", "indicator", "gram")  # float32 in ours, whatever the inputs are
WIDE_GRADS = ("grad of bias", "grad of sink")


def sampled_blocks(case: Case) -> list[tuple[int, int]]:
    """First and last rows, the rows around each of the first few run boundaries, and the middle."""
    offset, position, starts = case.num_keys - case.rows, 0, {0, case.rows // 2, case.rows - BLOCK_ROWS}
    for _, length in case.runs[:4]:
        position += length
        starts.add(position - offset - BLOCK_ROWS // 2)
    blocks, last = [], 0
    for start in sorted(max(0, min(s, case.rows - BLOCK_ROWS)) for s in starts):
        start, stop = max(start, last), min(case.rows, max(0, start) + BLOCK_ROWS)
        if start < stop:
            blocks.append((start, stop))
            last = stop
    return blocks


def sampled_batch(case: Case) -> list[int]:
    """The first sample and the last."""
    return sorted({0, case.batch - 1})


ALL = slice(None)


def tokens_of(tensor: torch.Tensor, batch: slice, tokens: slice) -> tuple:
    """Index of some tokens in (B, H, N), (B, H, N, .) or (M, B, H, N, D)."""
    return (*[ALL] * (tensor.dim() == 5), batch, ALL, tokens)


def pieces(case: Case, contender: Contender) -> list[tuple]:
    """(samples, rows, keys) of every problem that the reference solves."""
    if not contender.by_rows:
        return [(ALL, ALL, ALL)]
    batch, blocks, offset = sampled_batch(case), sampled_blocks(case), case.num_keys - case.rows
    return [(slice(b, b + 1), slice(*rows), slice(0, rows[1] + offset)) for b in batch for rows in blocks]


def sampled(case: Case, contender: Contender, output: torch.Tensor) -> list[torch.Tensor]:
    """Of an output, or its gradient, what each piece holds: views."""
    places = [tokens_of(output, *p[:2]) if contender.by_rows else ... for p in pieces(case, contender)]
    return [output[place] for place in places]


def dense_reference(
    case: Case, x: Inputs, contender: Contender, mode: str, dtype: torch.dtype, nudges: torch.Generator | None = None
) -> list[torch.Tensor]:
    """Outputs on the sampled rows, then gradients, each step of the mathematics in ``dtype``; pieces add in float64.

    With ``nudges`` the inputs are off by up to half a rounding.
    """
    names, leaves = contender.leaves, x.leaves(contender.leaves)
    outputs: list[list[torch.Tensor]] = []
    grads = [torch.zeros_like(t, dtype=torch.float64) for t in leaves]
    incoming = zip(*(sampled(case, contender, x.grad[name]) for name in contender.outputs), strict=True)
    for (batch, rows, keys), given in zip(pieces(case, contender), incoming, strict=True):
        where = {"key": keys, "value": keys} | dict.fromkeys(("query", "views", "bias", "sink"), rows)
        views = [tokens_of(t, batch, where[n]) if n in where else ... for n, t in zip(names, leaves, strict=True)]
        parts = [t.detach()[v].to(dtype) for t, v in zip(leaves, views, strict=True)]
        if nudges is not None:
            eps = torch.finfo(dtype).eps
            parts = [p * (1 + eps * (torch.rand(p.shape, generator=nudges).to(p) - 0.5)) for p in parts]
        for part in parts:
            part.requires_grad_(mode == "train")
        result = contender.dense(case, dict(zip(names, parts, strict=True)), x.key_modality[batch, keys])
        picked = [result[name] for name in contender.outputs]
        if mode == "train":
            upstream = [g.to(r.dtype) for g, r in zip(given, picked, strict=True)]
            for total, view, grad in zip(grads, views, torch.autograd.grad(picked, parts, upstream), strict=True):
                total[view] += grad
        outputs.append([r.detach().double() for r in picked])
    joined = [torch.cat([r.flatten() for r in column]) for column in zip(*outputs, strict=True)]
    return joined + (grads if mode == "train" else [])


@dataclass
class Verdict:
    worst: str  # the tensor nearest its bound
    error: float
    bound: float

    @property
    def excess(self) -> float:
        """Error over bound: above 1 ours fails the gate, above WRONG_FACTOR nobody is timed."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound else float("inf")

    def __str__(self) -> str:
        return f"{self.worst} off by {self.error:.1e}, bound {self.bound:.1e}"


class Gate:
    """Checks the contenders of one case; keeps the references that several of them share."""

    def __init__(self, case: Case, inputs: Inputs, mode: str):
        self.case, self.inputs, self.mode = case, inputs, mode
        self._cache: dict = {}

    def _references(self, contender: Contender, names: list[str]) -> tuple[list[torch.Tensor], list[float]]:
        """The float64 reference and the largest error of the dense way, for each tensor."""
        key = (contender.dense, contender.leaves, contender.outputs, contender.ours)
        if key not in self._cache:
            args = (self.case, self.inputs, contender, self.mode)
            runs, nudges = [dense_reference(*args, self.case.dtype)], torch.Generator().manual_seed(0)
            if self.case.dtype == torch.float32:
                runs += [dense_reference(*args, torch.float32, nudges) for _ in range(NUDGED_RUNS)]
            if self.case.dtype in LOW_PRECISION and contender.ours:
                single = dense_reference(*args, torch.float32)
                runs = [[s if n in WIDE else t for n, s, t in zip(names, single, runs[0], strict=True)]]
            exact = dense_reference(*args, torch.float64)
            errors = [max(map(distance, low, [ref] * len(runs))) for ref, *low in zip(exact, *runs, strict=True)]
            self._cache[key] = exact, errors
        return self._cache[key]

    def check(self, contender: Contender, call: Call) -> Verdict:
        case, x = self.case, self.inputs

        def incoming(name: str) -> torch.Tensor:
            """The incoming gradient of one output, zero outside the sampled rows."""
            kept = torch.zeros_like(x.grad[name])
            for part, grad in zip(*(sampled(case, contender, t) for t in (kept, x.grad[name])), strict=True):
                part.copy_(grad)
            return kept

        outputs = call()
        found = [torch.cat([part.flatten() for part in sampled(case, contender, o.detach())]).double() for o in outputs]
        names = list(contender.outputs)
        if self.mode == "train":
            leaves = x.leaves(contender.leaves)
            upstream = [incoming(name).to(o.dtype) for name, o in zip(names, outputs, strict=True)]
            found += [g.double() for g in torch.autograd.grad(outputs, leaves, upstream)]
            names += ["grad of " + name for name in contender.leaves]
        verdicts = []
        for name, got, ref, low_error in zip(names, found, *self._references(contender, names), strict=True):
            wide = contender.ours and name in WIDE + WIDE_GRADS
            low_precision = case.dtype in LOW_PRECISION
            rounding = rounding_unit(ref, torch.float32 if wide and low_precision else case.dtype)
            bound = 2 * low_error + 2 * rounding
            if case.dtype == torch.float64:  # nothing finer to measure by
                bound = 1e-11 * max(1.0, finite_max(ref))
            verdicts.append(Verdict(name, distance(got, ref), bound))
        return max(verdicts, key=lambda verdict: verdict.excess)


def rounding_unit(ref: torch.Tensor, dtype: torch.dtype) -> float:
    """The second term of the bound, before its factor 2."""
    rounded = ref.to(dtype)
    unit = distance((rounded + 0.3 - 0.3).double(), rounded.double())
    if 0 < ref.numel() < FEW:
        unit += 4 * torch.finfo(dtype).eps * finite_max(rounded)
    return unit


def finite_max(tensor: torch.Tensor) -> float:
    return tensor[tensor.isfinite()].abs().max().item()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Max norm of the difference; equal infinities (a row that sees nothing) are equal."""
    if a.numel() == 0:
        return 0.0
    difference = torch.where(a == b, 0.0, (a - b).abs())
    return float("inf") if bool(difference.isnan().any()) else difference.max().item()


_gates: dict = {}


def gate_for(case: Case, mode: str) -> Gate:
    """The gate of a case, shared by its contenders; only the last two (float32 and bfloat16) are kept."""
    key = (case, mode)
    if key not in _gates:
        while len(_gates) > 1:
            _gates.pop(next(iter(_gates)))
        inputs = make_inputs(case)
        inputs.require_grad(mode == "train")
        _gates[key] = Gate(case, inputs, mode)
    return _gates[key]


def checked_call(contender: Contender, case: Case, mode: str, row: dict):
    """The timed call, or None with row["reason"] when it fails or is wrong."""
    gate = gate_for(case, mode)
    try:
        forward = contender.build(case, gate.inputs)
        with torch.set_grad_enabled(mode == "train"):
            verdict = gate.check(contender, forward)
    except Exception as error:  # a peer that this torch or machine cannot run; ours must not be forgiven
        if contender.ours:
            raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        row["reason"] = f"failed: {type(error).__name__}: {first[0][:160]}"
        return None
    row.update(error=verdict.error, bound=verdict.bound, worst=verdict.worst)
    row["ok"] = verdict.excess <= (1.0 if contender.ours else WRONG_FACTOR)
    if verdict.excess > WRONG_FACTOR:
        row["reason"] = f"WRONG: {verdict}"
        return None
    return callable_for(contender, forward, gate.inputs, mode)


def forget_gates() -> None:
    """Frees their inputs and references."""
    _gates.clear()
