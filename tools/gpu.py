"""The first run on a GPU, or one after a change: one command that builds, tests, checks and measures, and leaves JSON.

python3 tools/gpu.py [--out build/gpu] [--minutes 10] [--only build pytest ...]      in an environment with a CUDA torch

Steps, each with a share of the time, none skipped because another failed; what does not fit into the time is cut off:
    build        the native libraries, for the GPUs of this machine
    verify       every operator against the reference: `moda-ext verify`
    pytest-gpu   the Python tests that use a GPU, with our kernels; graphs, streams, large tensors among them
    memcheck, racecheck, initcheck    compute-sanitizer on `verify --quick` (pip install nvidia-cuda-sanitizer-api)
    benchmarks   beside every peer (benchmarks/cuda.py)
    report       registers, spills, shared memory and instructions of the kernels (tools/cuda_report.py)
    pytest-cpu   the rest of the Python tests

What a step printed is in OUT/<step>.log, the outcome of all, with the number of tests that passed, failed and were
skipped, in OUT/gpu.json, and figures in OUT/verify.json, OUT/benchmarks.json and OUT/kernels.json. The exit status is 1
if any step failed. `verify` keeps the stamp that makes the kernels the default on this machine, unless MODA_EXT_STAMPS
says otherwise; where a sanitizer fails, delete it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from cuda_report import tool

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


def device_facts() -> dict:
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0); "
        "print(json.dumps({'name': p.name, 'capability': [p.major, p.minor], 'memory': p.total_memory, "
        "'multiprocessors': p.multi_processor_count, 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
    )
    result = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"gpu.py: torch sees no GPU.\n{result.stderr}")
    return json.loads(result.stdout)


def count_tests(report: Path) -> dict:
    """What pytest's report says, nothing without one."""
    if not report.exists():
        return {}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {what: int(suite.get(what)) for what in ("tests", "failures", "errors", "skipped")}
    return {"tests": {"run": counts.pop("tests"), **counts}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="+", help="names of the steps to run")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("pytest-*.xml"):
        old.unlink()
    verify = [PYTHON, "-m", "moda_ext.verify", "--device", "cuda", "--json"]
    quick = [*verify, out / "quick.json", "--quick"]
    facts = device_facts()
    major, minor = facts["capability"]
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")

    sanitizer = tool("compute-sanitizer")
    pytest = [PYTHON, "-m", "pytest", "-q", "-rs", "python_tests"]
    steps = [  # name, share of the time, command (None: cannot run)
        ("build", 0.3, [PYTHON, "setup.py", "build_clib", "build_ext", "--inplace"]),
        ("verify", 0.3, [*verify, out / "verify.json"]),
        ("pytest-gpu", 0.3, [*pytest, "-k", "cuda", "--junitxml", out / "pytest-gpu.xml"]),
        *(
            (name, 0.07, [sanitizer, "--tool", name, "--error-exitcode", "1", *quick] if sanitizer else None)
            for name in ("memcheck", "racecheck", "initcheck")
        ),
        (
            "benchmarks",
            0.25,
            # Compiling FlexAttention can take longer than the calls: the last case may overrun by as much.
            [PYTHON, "-m", "benchmarks.cuda", "--minutes", 0.15 * arguments.minutes, "--json", out / "benchmarks.json"],
        ),
        ("report", 0.15, [PYTHON, "tools/cuda_report.py", "--arch", arch, "--check", "--json", out / "kernels.json"]),
        ("pytest-cpu", 0.5, [*pytest, "-k", "not cuda", "--junitxml", out / "pytest-cpu.xml"]),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MODA_EXT_BACKEND": "native",
        "MODA_EXT_REQUIRE_NATIVE": "1",
        "MODA_EXT_BUILD_CUDA": "1",
    }
    results, start = [], time.monotonic()
    for name, share, command in steps:
        if arguments.only and name not in arguments.only:
            continue
        began = time.monotonic()
        if command is None:
            outcome = "skipped: compute-sanitizer is not installed"
        else:
            own = dict(env)
            if name.endswith("check"):  # the caching allocator would hide accesses beyond a tensor
                own["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            with open(out / f"{name}.log", "w") as log:
                try:
                    left = arguments.minutes * 60 - (time.monotonic() - start)
                    limit = max(1.0, min(share * arguments.minutes * 60, left))
                    words = [str(word) for word in command]
                    status = subprocess.run(
                        words, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT, timeout=limit
                    ).returncode
                    outcome = "passed" if status == 0 else f"failed with status {status}"
                except subprocess.TimeoutExpired:
                    outcome = f"failed: not done after {limit:.0f} s"
        results.append({"step": name, "outcome": outcome, "seconds": round(time.monotonic() - began, 1)})
        results[-1] |= count_tests(out / f"{name}.xml")
        counts = "".join(f", {number} {what}" for what, number in results[-1].get("tests", {}).items() if number)
        print(f"{name:12}{outcome} ({results[-1]['seconds']} s{counts})", flush=True)
        (out / "gpu.json").write_text(json.dumps({"device": facts, "steps": results}, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s; results in {out}")
    if any(step["outcome"].startswith("failed") for step in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
