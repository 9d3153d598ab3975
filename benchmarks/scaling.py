"""Two threads against one, on a quiet machine and beside one busy process: python -m benchmarks.scaling [--quick]

Ours (bias, sink, lse and mass) and torch SDPA (causal alone) on the shapes of small-cpu, each first held against the
float64 reference. The busy process is a child that counts; nothing is pinned, so the operating system decides who
shares a core with it. In each round everyone is timed once, with one thread and with two, long enough for many turns of
its scheduler; figures are medians over the rounds, speed-ups and ratios are taken round by round. The machine has to be
idle otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from .gate import checked_call, forget_gates
from .peers import OURS, PEERS, Call
from .timing import SHORT, clock, machine, ratio
from .workloads import WORKLOADS, Case

CONTENDERS = [OURS[0], next(peer for peer in PEERS if peer.name == "sdpa")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "train")
STATES = ("quiet", "busy")
SAMPLE = 0.05  # seconds of a sample at least: a turn of a process takes 3 or 4 milliseconds
FEWEST_ROUNDS = 3

Times = dict[tuple[str, int], list[float]]  # of (contender, threads): seconds per call by round


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()  # it has started
        yield
        if child.poll() is not None:
            raise RuntimeError(f"the busy process ended by itself, status {child.returncode}")
    finally:
        child.kill()
        child.communicate()


def measure(calls: dict[str, Call], seconds: float) -> Times:
    """Rounds of every call with one thread and with two, in changing order."""
    times: Times = {(name, threads): [] for threads in (1, 2) for name in calls}
    once: dict[tuple[str, int], float] = {}
    start = time.monotonic()
    for index in range(10_000):
        if index > FEWEST_ROUNDS and time.monotonic() - start > seconds:
            break
        for name, threads in list(times)[:: 1 if index % 2 == 0 else -1]:
            torch.set_num_threads(threads)  # outside of what is timed: it starts and ends threads
            key, call = (name, threads), calls[name]
            if index == 0:  # a round that does not count
                call()
                once[key] = clock(call)
                continue
            if once[key] < SHORT:
                call()
            times[key].append(clock(call, max(1, round(SAMPLE / once[key]))))
    return times


def figures_of(times: Times) -> dict[str, float]:
    """Medians: milliseconds, speed-ups from one thread to two, and ours / SDPA with two."""
    figures = {f"{name} {threads}": 1e3 * statistics.median(t) for (name, threads), t in times.items()}
    for contender in CONTENDERS:
        figures[f"speed-up of {contender.name}"] = ratio(times[contender.name, 1], times[contender.name, 2])
    figures["ours / sdpa"] = ratio(times["ours", 2], times["sdpa", 2])
    return figures


def run_case(case: Case, mode: str, seconds: float) -> list[dict]:
    """One row for each state of the machine."""
    rows, calls = [], {}
    for contender in CONTENDERS:
        checked: dict = {}
        calls[contender.name] = checked_call(contender, case, mode, checked)
        if calls[contender.name] is None:
            raise SystemExit(f"benchmarks.scaling: {case.label}, {mode}, {contender.name}: {checked['reason']}")
        if not checked["ok"]:
            print(f"{contender.name}: {checked['worst']} off by {checked['error']:.1e}, bound {checked['bound']:.1e}")
    for state in STATES:
        with busy_process(state == "busy"):
            times = measure(calls, seconds)
        label = {"case": case.label, "mode": mode, "dtype": str(case.dtype).removeprefix("torch."), "state": state}
        samples = {f"{name} {threads}": t for (name, threads), t in times.items()}
        rows.append({**label, **figures_of(times), "samples": samples})
    return rows


COLUMNS = {  # heading: figure
    "ours 1": "ours 1",
    "ours 2": "ours 2",
    "speed-up": "speed-up of ours",
    "sdpa 1": "sdpa 1",
    "sdpa 2": "sdpa 2",
    "speed-up ": "speed-up of sdpa",
    "ours/sdpa": "ours / sdpa",
}


def print_row(label: str, state: str, figures: dict) -> None:
    print(f"{label:42}{state:6}" + "".join(f"{figures[name]:>10.2f}" for name in COLUMNS.values()), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, help="for one case in one mode and state; default: 8, 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="N=1024 alone: about a minute instead of five")
    parser.add_argument("--json", metavar="FILE", help="machine, figures and all samples")
    args = parser.parse_args(argv)
    seconds = args.seconds if args.seconds is not None else 3.0 if args.quick else 8.0
    about = machine()
    if about["cores"] < 2:
        raise SystemExit(f"benchmarks.scaling: needs two cores, this process may use {about['cores']}")
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {about['moda_ext']['isa'] or 'fallback'}")
    print(f"load before: {os.getloadavg()[0]:.1f}. Ours 1, ours 2: median ms with so many threads\n")
    print(" " * 48 + "".join(f"{heading.strip():>10}" for heading in COLUMNS))
    rows = []
    for dtype in args.dtype:
        for mode in args.mode:
            for case in WORKLOADS["small-cpu"]:
                if args.quick and case.num_keys > 1024:
                    continue
                rows += run_case(replace(case, dtype=DTYPES[dtype]), mode, seconds)
                for row in rows[-len(STATES) :]:
                    print_row(f"{case.label}, {mode}, {dtype}", row["state"], row)
    forget_gates()
    print()
    for state in STATES:
        of_state = [row for row in rows if row["state"] == state]
        print_row("median of all", state, {f: statistics.median(r[f] for r in of_state) for f in COLUMNS.values()})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": about, "seconds": seconds, "results": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
