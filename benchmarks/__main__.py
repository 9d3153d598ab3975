"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace

import torch

from . import goals
from .aligner import ALIGNER
from .aligner import CONTENDERS as OF_KEYS_IN_A_ROW
from .gate import checked_call, forget_gates
from .memory import measure_in_subprocess
from .paged import PAGED
from .peak import SOURCE, multiply_adds
from .peers import OURS, Call
from .timing import available_memory, callable_for, interleave, keep_memory, machine, ratio, taken
from .workloads import WORKLOADS, Case, growth_case, make_inputs

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXIT_GATE, EXIT_GOALS = 1, 2
GOAL_WORKLOADS = ["small-cpu", "decode", "aligned", "aligner-batch", "gram", "paged"]
CONTENDERS = {**OF_KEYS_IN_A_ROW, "paged": PAGED}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def listed(choices):
        def parse(text):
            names = list(choices) if text == "all" else text.split(",")
            unknown = [name for name in names if name not in choices]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(choices)}, or all")
            return names

        return parse

    peers = [c.name for kind in CONTENDERS.values() for c in kind if not c.ours]
    modes = ["forward", "train"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Modular attention with bias, sink, lse and mass, aligner and layer, beside what PyTorch offers.",
        epilog="Exit status: 1 if ours disagrees with the float64 reference, 2 if --check-goals finds a goal missed.",
    )
    parser.add_argument("--workload", type=listed(WORKLOADS), help=f"{', '.join(WORKLOADS)}, or all")
    parser.add_argument("--peers", type=listed(peers), default=peers, help=", ".join(peers))
    parser.add_argument("--mode", type=listed(modes), default=modes, help="forward, train")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent timing one case in one mode (8)")
    parser.add_argument("--max-gflop", type=float, default=1500, help="skip calls with more useful work than this")
    parser.add_argument("--quick", action="store_true", help="three rounds each, shorter lengths: is everything alive?")
    parser.add_argument("--memory", action="store_true", help=f"also measure peak memory at N={goals.MEMORY_LENGTH}")
    growth = {"type": listed(goals.GROWTH_LENGTHS), "nargs": "?", "const": list(goals.GROWTH_LENGTHS), "default": []}
    parser.add_argument(
        "--growth", **growth, help="also time per useful FLOP against length: attention, aligner, or all"
    )
    keep = "freed memory is used again: times without the page faults of large outputs (growth is always so)"
    parser.add_argument("--keep-memory", action="store_true", help=keep)
    parser.add_argument(
        "--check-goals", action="store_true", help="run what the goals need (or --workload) and say which are met"
    )
    parser.add_argument("--json", metavar="FILE", help="write machine, options, all samples and verdicts")
    args = parser.parse_args(argv)
    if args.check_goals:
        args.mode, args.dtype = modes, "float32"
        args.peers = [p for p in peers if p not in ("onehot-v", "eager")]
        if args.workload is None:
            args.workload, args.memory, args.growth = GOAL_WORKLOADS, True, list(goals.GROWTH_LENGTHS)
    args.workload = args.workload or ["small-cpu", "llava-1.5"]
    return args


def say(text: str) -> None:
    """What is going on, on a terminal, in one line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run_case(case: Case, mode: str, args: argparse.Namespace) -> list[dict]:
    """Check, then time, every contender of one case; one result row each, the one that others are measured by first."""
    dtype = str(case.dtype).removeprefix("torch.")
    label = {"workload": case.workload, "case": case.label, "mode": mode, "dtype": dtype}
    wanted = [c for c in CONTENDERS[case.kind] if c.ours or c.name in args.peers]
    gflop = wanted[0].useful_flops(case, mode) / 1e9
    if gflop > args.max_gflop:
        print(f"\n{case.label}, {mode}: skipped: {gflop:.0f} GFLOP a call, limit --max-gflop {args.max_gflop:g}")
        return []
    need = 3 * case.key_value_bytes()  # the inputs, their bfloat16 copies, and one batch element in float64
    if need > 0.6 * available_memory():
        print(f"\n{case.label}, {mode}: skipped: inputs need about {need / 1e9:.0f} GB")
        return []
    if mode == "train" and case.rows != case.num_keys:
        print(f"\n{case.label}, {mode}: skipped: decoding has no backward")
        return []
    torch.compiler.reset()  # compiled FlexAttention of earlier shapes
    contenders = [(c, case) for c in wanted]
    if case.kind == "attention" and case.dtype == torch.float32:
        bf16 = replace(OURS[0], name="ours-bf16", what="ours on bfloat16 inputs")
        contenders.insert(len(OURS), (bf16, replace(case, dtype=torch.bfloat16)))

    rows, calls = [], {}
    for contender, own_case in contenders:
        row = {**label, "contender": contender.name, "what": contender.what, "ours": contender.ours}
        row["gflop"] = contender.useful_flops(case, mode) / 1e9
        rows.append(row)
        row["reason"] = contender.obstacle(own_case, mode, 0.6 * available_memory())
        if row["reason"]:
            continue
        say(f"{case.label}, {mode}: checking {contender.name}")
        calls[contender.name] = checked_call(contender, own_case, mode, row)
        if calls[contender.name] is None:
            del calls[contender.name]
    if case.kind == "attention" and case.dtype == torch.float32 and mode == "forward" and case.rows > 1:
        rows.append({**label, "contender": "peak", "what": "multiply-adds in registers: the limit without tiles"})
        rows[-1] |= peak_row(calls)
    say(f"{case.label}, {mode}: timing {', '.join(calls)}")
    rounds = (3, 3) if args.quick else (5, 200)
    samples = interleave(calls, args.seconds, rounds) if wanted[0].name in calls else {}
    for row in rows:
        row["samples"] = samples.get(row["contender"], [])
    return rows


def peak_row(calls: dict[str, Call]) -> dict:
    """Adds the machine's multiply-adds to what is timed. They have nothing to be checked against."""
    row = {"ours": False, "gflop": 0.0, "reason": None, "ok": True}
    try:
        calls["peak"], row["gflop"] = multiply_adds(torch.get_num_threads())
    except (OSError, subprocess.CalledProcessError) as error:
        row["reason"] = f"n/a: {SOURCE.name} does not compile: {getattr(error, 'stderr', None) or error}"
    return row


def print_rows(rows: list[dict]) -> None:
    say("")
    if not rows:
        return
    first = rows[0]
    print(f"\n{first['case']}, {first['mode']}, {first['dtype']}: {first['gflop']:.1f} useful GFLOP")
    peak = next((row for row in rows if row["contender"] == "peak" and row["samples"]), None)
    print(f"  {'':16}{'ms':>9} {'min':>8} {'max':>8} {'GFLOP/s':>8} ", end="")
    print(f"{'of peak':>8} " * (peak is not None) + f"{first['contender'] + '/it':>10}  error/bound")
    for row in rows:
        t = taken(row["samples"])
        if not t:
            print(f"  {row['contender']:16}{row['reason'] or 'not timed'}")
            continue
        middle = statistics.median(t)
        times = f"{middle * 1e3:9.2f} {min(t) * 1e3:8.2f} {max(t) * 1e3:8.2f} {row['gflop'] / middle:8.0f}"
        share = "" if peak is None else f"{goals.rate_share(row, peak):8.0%} "
        relative = f"{ratio(first['samples'], row['samples']):10.2f}"
        accuracy = f"{row['error']:.0e}/{row['bound']:.0e}" if "error" in row else ""
        accuracy += "" if row["ok"] else f" {row['worst']} OVER ITS BOUND"
        print(f"  {row['contender']:16}{times} {share}{relative}  {accuracy:11}  {row['what']}")
    sys.stdout.flush()


def run_growth(kinds: list[str], quick: bool) -> dict[str, dict[int, float]]:
    """Time per useful FLOP at each length over that at the first one, in memory that is there already."""
    if kinds:
        keep_memory()
    table = {}
    contenders = {"attention": OURS[0], "aligner": ALIGNER}
    for kind, mode in ((k, m) for k in kinds for m in goals.GROWTH_LENGTHS[k]):
        contender, title = contenders[kind], f"{kind}, {mode}"
        lengths = goals.GROWTH_LENGTHS[kind][mode][: 3 if quick else None]
        say(f"growth, {title}: N = {lengths}")
        calls, flops = {}, {}
        for n in lengths:
            case = growth_case(n, kind)
            inputs = make_inputs(case)
            inputs.require_grad(mode == "train")
            calls[n] = callable_for(contender, contender.build(case, inputs), inputs, mode)
            flops[n] = contender.useful_flops(case, mode)
        samples = interleave(calls, seconds=20.0, rounds=(3, 30))
        first = lengths[0]
        table[title] = {n: ratio(samples[n], samples[first]) * flops[first] / flops[n] for n in lengths}
        rate = flops[first] / statistics.median(taken(samples[first])) / 1e9
        say("")
        print(f"\ngrowth, {title}: {rate:.0f} GFLOP/s at N={first}; time per useful FLOP against it:")
        print("  " + "  ".join(f"N={n} {value:.2f}" for n, value in table[title].items()))
    return table


def run_memory() -> dict[str, float | None]:
    """Extra megabytes of one call, forward and train."""
    n, table = goals.MEMORY_LENGTH, {}
    for mode in ("forward", "train"):
        say(f"memory, {mode}: N = {n}")
        table[mode] = measure_in_subprocess(n, mode)
    say("")
    figures = ", ".join(f"{mode} " + ("not measured" if mb is None else f"{mb:.1f} MB") for mode, mb in table.items())
    print(f"\npeak memory beyond inputs and outputs, N={n}, Hq=8, Hkv=2, D=128: {figures}")
    return table


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        keep_memory()
    about = machine()
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']} "
        f"({about['torch_cpu_capability']}), moda_ext {about['moda_ext']['version']} "
        f"({about['moda_ext']['isa'] or 'fallback'})"
    )
    if not about["moda_ext"]["native"]:
        print("The native library is not loaded: 'ours' is the dense PyTorch fallback.")
    results = []
    for name in args.workload:
        for case in WORKLOADS[name]:
            for mode in args.mode:
                rows = run_case(replace(case, dtype=DTYPES[args.dtype]), mode, args)
                print_rows(rows)
                results += rows
    forget_gates()
    memory = run_memory() if args.memory else {}
    growth = run_growth(args.growth, args.quick)
    wanted = goals.cpu_goals(about["moda_ext"]["isa"])
    verdicts = goals.judge(results, memory, growth, wanted) if args.check_goals else []
    if verdicts:
        goals.print_goals(verdicts)
    if args.json:
        command = ["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]
        record = {"machine": about, "command": command, "results": results, "memory_mb": memory, "growth": growth}
        with open(args.json, "w") as file:
            json.dump({**record, "goals": verdicts}, file, indent=1)
    wrong = [r for r in results if r["ours"] and r.get("ok") is False]
    for row in wrong:
        print(f"{row['case']}, {row['mode']}: {row['contender']} is off: {row['worst']}", file=sys.stderr)
    if wrong:
        return EXIT_GATE
    return EXIT_GOALS if any(v["met"] is False for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
