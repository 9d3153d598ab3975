"""Proves the native operators right on this machine, and keeps a stamp of it.

On a GPU the operators that passed are then used by default; on a CPU, where all are used, those that failed no longer
are. A proof takes one to three minutes. The exit status is 1 where something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moda_ext._info import info
from moda_ext._ops import backend, library, stamps
from moda_ext._ops.limits import FLOATS
from moda_ext.verify import checks, timing
from moda_ext.verify.cases import FAMILIES, Case, cases

# Each, and the cap ATEN_CPU_CAPABILITY that leads there.
ISAS = {"baseline": "default", "neon": "default", "avx2": "avx2", "avx512": "avx512", "avx512_bf16": "avx512_bf16"}
QUICK = 11  # of so many cases one, with --quick
OTHER_CHECKS = 13  # of so many cases one, for what costs more than a call or two
THREADED = 3  # of so many cases one on all threads of a CPU: small calls wait for the slowest, long where others work
ON_A_GPU: dict[str, Callable[[Case, torch.device], str | None]] = {
    "graphs": checks.fails_in_a_graph,
    "streams": checks.fails_on_two_streams,
    "no waiting": checks.waits_for_the_device,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("moda-ext verify", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="OPERATOR", help="no stamp is kept")
    parser.add_argument("--quick", action="store_true", help="a few cases, memory as it comes; no stamp is kept")
    parser.add_argument("--isa", choices=("all", "current"), default="all", help="instruction sets of a CPU")
    parser.add_argument("--json", type=Path, default=Path("moda_verify.json"), help="the report")
    options = parser.parse_args(arguments)
    device = usable_device(options.device)
    if not options.json.parent.is_dir():
        raise SystemExit(f"moda-ext verify: --json: no such directory: {options.json.parent}")
    reports = [report(device, options.only or list(FAMILIES), quick=options.quick, stamp=not options.only)]
    if device.type == "cpu" and options.isa == "all":
        reports += [child(isa, options) for isa in lower_isas()]
    options.json.write_text(json.dumps(reports, indent=1) + "\n")
    failed = any(told["not_kept"] or any(told["failures"].values()) for told in reports)
    seconds = sum(told["seconds"] for told in reports)
    print(f"\n{'FAILED' if failed else 'passed'}, in {seconds:.0f} s; report in {options.json}")
    return 1 if failed else 0


def usable_device(name: str) -> torch.device:
    """The device, with its index; SystemExit with the reason where native operators cannot run there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SystemExit(f"moda-ext verify: --device: no device {name!r}: cpu, cuda or cuda:1, for example") from error
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"moda-ext verify: --device: there are native operators for cpu and cuda, not for {name}")
    if not library.native_loaded:
        raise SystemExit(f"moda-ext verify: {library.fallback_reason}: there is nothing to verify")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise SystemExit(f"moda-ext verify: --device {name}: torch {torch.__version__} sees no GPU")
    if not library.cuda_loaded:
        raise SystemExit(f"moda-ext verify: this moda_ext has no CUDA operators: {info()['build']}")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise SystemExit(f"moda-ext verify: --device {name}: there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def lower_isas() -> list[str]:
    """The instruction sets below the one in use that this build has and this machine can be capped to."""
    built = library.build_info["isas"] if library.build_info else []
    return [isa for isa in built[: built.index(info()["isa"])] if isa in ISAS][::-1]


def child(isa: str, options: argparse.Namespace) -> dict[str, Any]:
    """The report of a process on another instruction set, which is chosen once for each process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "moda_ext.verify", "--device", "cpu", "--isa", "current", "--json", str(file)]
        command += ["--quick"] * options.quick + (["--only", *options.only] if options.only else [])
        ended = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": ISAS[isa]}, stdout=subprocess.PIPE)
        print(ended.stdout.decode().rpartition("\n\n")[0])  # all but what became of the report, which goes into ours
        if file.exists():
            return json.loads(file.read_text())[0]
    print(f"{isa}: the process ended with status {ended.returncode}")
    failures = {"": f"status {ended.returncode}"}
    return {"circumstances": {"isa": isa}, "failures": failures, "not_kept": None, "seconds": 0.0}


def report(device: torch.device, operators: Sequence[str], *, quick: bool, stamp: bool) -> dict[str, Any]:
    """Runs the checks, prints them as they end, and keeps the stamp of a whole run."""
    began = time.monotonic()
    facts = stamps.circumstances(device)
    print("\n" + ", ".join(f"{name} {value[:24]}" for name, value in facts.items()))
    print(f"{'operator':26}{'check':14}{'cases':>6}{'failed':>8}{'worst':>7}{'s':>7}")
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), checks.exact_products():
        for operator in operators:
            found = [row for row in run_operator(operator, device, quick) if row["cases"]]
            wrong = [failure for row in found for failure in row["failed"]]
            if found:
                failures[operator] = wrong[0] if wrong else ""
            rows += found
    if not failures:
        raise SystemExit(f"moda-ext verify: {', '.join(operators)}: no native kernels on {device}")
    kept = keep(facts, failures) if stamp and not quick else None
    times = time_attention(device) if not quick and failures.get("modular_attention") == "" else []
    seconds = round(time.monotonic() - began, 1)
    found_out = {"failures": failures, "checks": rows, "times": times, "not_kept": kept}
    for operator, failure in failures.items():
        if failure:
            told = f"python -m moda_ext.verify --device {device} --only {operator} --json report.json"
            print(f"{operator} FAILED: {failure}\n  it stays on its other backend. To report it: {told}")
    return {"circumstances": facts, **found_out, "seconds": seconds}


def keep(facts: dict[str, str], failures: dict[str, str]) -> str | None:
    """Keeps the stamp; why not, where that is an error."""
    if stamps.folder() is None:
        print("no stamp is kept: MODA_EXT_STAMPS=0, or there is no home directory")
        return None
    try:
        print(f"stamp: {stamps.write(facts, failures)}")
    except OSError as error:
        print(f"cannot keep the stamp in {stamps.folder()}: {error}")
        return str(error)
    return None


def run_operator(operator: str, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each check of an operator that has native kernels on this device."""
    dtypes = tuple(dtype for dtype in FLOATS if runs_natively(operator, device, dtype))
    chosen = list(cases(operator, dtypes, some=device.type == "cpu"))[:: QUICK if quick else 1]
    turns = itertools.count()

    def accuracy(case: Case) -> tuple[str | None, float]:
        all_threads = next(turns) % THREADED == 0
        with contextlib.nullcontext() if all_threads else checks.one_thread():
            error = checks.error_of(case, device, poison=not quick)
        reason = f"{error.result} is off by {error.error:.2g}, {error.part:.2g} of what is allowed"
        return (None if error.part <= 1 else reason), error.part

    yield run_check(operator, "accuracy", chosen, accuracy)
    some = chosen[::OTHER_CHECKS]
    others = {"same again": checks.changes_when_repeated, **(ON_A_GPU if device.type == "cuda" else {})}
    for name, check in others.items():
        yield run_check(operator, name, some, lambda case, check=check: (check(case, device), 0.0))  # type: ignore[misc]


def run_check(
    operator: str, name: str, chosen: list[Case], check: Callable[[Case], tuple[str | None, float]]
) -> dict[str, Any]:
    began, failed, worst = time.monotonic(), [], 0.0
    for case in chosen:
        try:
            reason, part = check(case)
        except Exception as error:  # of a kernel, or a refusal: it is the answer to what is asked here
            reason, part = f"{type(error).__name__}: {error}", 0.0
        worst = max(worst, part)
        if reason is not None:
            failed.append(f"{name}: {case.label}: {reason}")
    seconds = time.monotonic() - began
    row = {"operator": operator, "check": name, "cases": len(chosen), "failed": failed, "worst": worst}
    row["seconds"] = round(seconds, 2)
    if chosen:
        told = f"{worst:7.2f}" if name == "accuracy" else f"{'':7}"
        print(f"{operator:26}{name:14}{len(chosen):6}{len(failed):8}{told}{seconds:7.1f}", flush=True)
    return row


def runs_natively(operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    with backend.use_backend("native"):
        return backend.explain(operator, device.type, dtype).backend == backend.NATIVE


def time_attention(device: torch.device) -> list[dict[str, Any]]:
    on_gpu = device.type == "cuda"
    names = [backend.NATIVE, *((backend.FLEX,) if on_gpu else ())]
    dtype, length = (torch.bfloat16, 4096) if on_gpu else (torch.float32, 1024)
    print(f"attention, N={length}, D=128, {str(dtype)[6:]}, causal, ms")
    found = []
    measured = timing.attention_times(
        [length], names, heads=32 if on_gpu else 8, head_size=128, device=device, dtype=dtype, seconds=0.5
    )
    try:
        for times in measured:
            print(f"  {times.what:20}" + "".join(f"{name} {1e3 * t:.2f}   " for name, t in times.medians.items()))
            found.append(times._asdict())
    except RuntimeError as error:  # of a peer, or no memory: what is proven is proven
        print(f"  not timed: {error}")
    return found


if __name__ == "__main__":
    sys.exit(main())
