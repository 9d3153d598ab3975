"""Ours and its peers on a GPU: python -m benchmarks.cuda [--workload ...] [--minutes M] [--json FILE]

The contenders of the other benchmarks on CUDA tensors, bfloat16, with PyTorch's and other libraries' kernels in place
of those for CPUs; each is first held against the float64 reference on the same inputs (gate.py). Times are of CUDA
events, medians over rounds in which the contenders take turns; before each call more memory than any cache holds is
written. Extra is the peak of a call's memory beyond its inputs and outputs. Beside the rates stands the machine's own:
a product of two large matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace

import torch

import moda_ext

from . import goals
from .aligner import CONTENDERS
from .gate import checked_call, forget_gates
from .peers import CUDA_PEERS, OURS, Call, Contender
from .timing import Samples, machine, ratio
from .workloads import LLAVA_NEXT, WORKLOADS, Case, image_in_text


def _causal(label: str, vision: int, **changes) -> Case:
    return Case("causal", f"causal {label}", image_in_text(64, vision, 960), key_heads=32, **changes)


CASES = {
    "llava-next": [LLAVA_NEXT],
    "causal": [
        _causal("4k", 3072, batch=4),
        _causal("8k", 7168, batch=2),
        _causal("8k D=64", 7168, batch=2, head_dim=64),
    ],
    **{name: WORKLOADS[name] for name in ("decode", "aligned", "aligner-batch", "gram", "interleaved", "video")},
}
SCRATCH = 1 << 30  # bytes written before each call: the caches forget, and the host gets ahead of the device
LARGE = 8192  # rows and columns of the matrices that show the machine's rate


def contenders_of(case: Case) -> list[Contender]:
    return OURS + CUDA_PEERS if case.kind == "attention" else CONTENDERS[case.kind]


def free_memory() -> float:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def measure(calls: dict[str, Call], rounds: int) -> dict[str, Samples]:
    """Seconds of each call by round, A B C C B A A B C ..."""
    scratch = torch.empty(SCRATCH, dtype=torch.uint8, device="cuda")
    events: dict[str, list] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name, call in list(calls.items())[:: 1 if i % 2 == 0 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def extra_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    return torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in outputs)


def product_rate(rounds: int) -> float:
    """FLOP/s."""
    left, right = (torch.randn(LARGE, LARGE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    samples = measure({"mm": lambda: (left @ right,)}, rounds)["mm"]
    return 2 * LARGE**3 / statistics.median(samples)


def run_case(case: Case, mode: str, rounds: int) -> list[dict]:
    """Check, then time, every contender; one row each, ours first."""
    torch.compiler.reset()  # compiled FlexAttention of earlier shapes
    forget_gates()
    rows, calls = [], {}
    for contender in contenders_of(case):
        row = {"workload": case.workload, "case": case.label, "mode": mode, "contender": contender.name}
        row |= {"what": contender.what, "ours": contender.ours, "gflop": contender.useful_flops(case, mode) / 1e9}
        rows.append(row)
        row["reason"] = contender.obstacle(case, mode, 0.8 * free_memory())
        call = None if row["reason"] else checked_call(contender, case, mode, row)
        if call is not None:
            row["extra_mb"] = extra_bytes(call) / 1e6
            calls[contender.name] = call
    samples = measure(calls, rounds)
    for row in rows:
        row["samples"] = samples.get(row["contender"], [])
    return rows


def print_rows(rows: list[dict], rate: float) -> None:
    first = rows[0]
    print(f"\n{first['case']}, {first['mode']}: {first['gflop']:.0f} useful GFLOP")
    print(
        f"  {'':16}{'ms':>9} {'min':>8} {'max':>8} {'TFLOP/s':>8} {'of mm':>6} {first['contender'] + '/it':>8} extra MB"
    )
    for row in rows:
        t = row["samples"]
        if not t:
            print(f"  {row['contender']:16}{row['reason'] or 'not timed'}")
            continue
        middle = statistics.median(t)
        speed = row["gflop"] / middle / 1e3
        times = f"{middle * 1e3:9.3f} {min(t) * 1e3:8.3f} {max(t) * 1e3:8.3f} {speed:8.1f} {speed * 1e12 / rate:6.0%}"
        relative = f"{ratio(first['samples'], t):8.2f}" if first["samples"] else f"{'-':>8}"
        off = "" if row["ok"] else f"  {row['worst']} OVER ITS BOUND: {row['error']:.0e}, {row['bound']:.0e} allowed"
        print(f"  {row['contender']:16}{times} {relative} {row['extra_mb']:8.0f}  {row['what']}{off}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--mode", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60, help="no further case begins after this long")
    parser.add_argument("--json", metavar="FILE", help="all samples and verdicts, written after each case")
    args = parser.parse_args(argv)
    if moda_ext.info()["cuda_kernels"] != "native":
        raise SystemExit("benchmarks.cuda: the CUDA kernels are not in use. Fix: set MODA_EXT_BACKEND=native.")
    start = time.monotonic()
    rate = product_rate(args.rounds)
    about = {**machine(), "gpu": torch.cuda.get_device_name(), "product_tflops": rate / 1e12}
    print(
        f"{about['gpu']}, torch {about['torch']}: a product of {LARGE} x {LARGE} matrices at {rate / 1e12:.0f} TFLOP/s"
    )
    results, left_out = [], []
    for case, mode in ((c, m) for name in args.workload for c in CASES[name] for m in args.mode):
        if mode == "train" and case.rows != case.num_keys:  # decoding has no backward
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left_out.append(f"{case.label}, {mode}")
            continue
        rows = run_case(replace(case, dtype=torch.bfloat16, device="cuda"), mode, args.rounds)
        print_rows(rows, rate)
        results += rows
        verdicts = goals.judge(results, {}, {}, goals.CUDA_GOALS)
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"machine": about, "results": results, "goals": verdicts}, file, indent=1)
    goals.print_goals(verdicts if results else [])
    if left_out:
        print(f"left out after {args.minutes} minutes: {'; '.join(left_out)}")
    return 1 if any(row["ours"] and not row.get("ok") for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
