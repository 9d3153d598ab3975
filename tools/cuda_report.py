"""What the compiler made of the CUDA kernels: registers, spills and shared memory, and the instructions that matter.

python3 tools/cuda_report.py [--arch 80 90a] [--json FILE] [--check]     needs nvcc, no GPU

Compiles every .cu file of csrc/sources.json and prints a line for each kernel and architecture: registers, bytes
spilled, and how many tensor-core products (HMMA), matrix loads from shared memory (LDSM), 128-bit asynchronous copies
(LDGSTS.128) and 128-bit loads and stores are in its machine code (- without cuobjdump). --check, which needs cuobjdump,
fails where a 16-bit kernel of products spills registers, or lacks tensor-core products, matrix loads or 128-bit copies.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", "-Werror=all-warnings", "-Xptxas=-v"]
INSTRUCTIONS = {
    "HMMA": r"\bHMMA\.",
    "LDSM": r"\bLDSM\.",
    "LDGSTS.128": r"\bLDGSTS\.\S*128",
    "LDG.128": r"\bLDG\.\S*128",
    "STG.128": r"\bSTG\.\S*128",
    "FFMA": r"\bFFMA\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
}
MAIN = (
    *("ForwardKernel", "KeyKernel", "QueryKernel"),
    *("GramKernel", "GramBackwardKernel"),
    *("ProjectionKernel", "RowGradientKernel", "LaterKernel", "KeyGradientKernel"),
)


def tool(name: str, required: bool = True) -> str | None:
    """nvcc or cuobjdump: of CUDA_HOME, else of the path, else (cuobjdump) the copy in Triton's wheel."""
    if os.environ.get("CUDA_HOME"):
        path = Path(os.environ["CUDA_HOME"]) / "bin" / name
        if path.exists():
            return str(path)
    if shutil.which(name):
        return name
    for folder in map(Path, sys.path):
        path = folder / "triton" / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    if not required:
        return None
    raise SystemExit(f"cuda_report.py: {name} not found. Fix: set CUDA_HOME to a CUDA toolkit, or install triton.")


def run(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        raise SystemExit(f"cuda_report.py: failed: {' '.join(command)}\n{result.stdout}")
    return result.stdout


def readable(symbols: list[str]) -> dict[str, str]:
    """KeyKernel<BFloat16, 128> for a mangled entry point."""
    names = subprocess.run(["c++filt"], input="\n".join(symbols), text=True, capture_output=True).stdout.splitlines()
    short = {}
    for symbol, name in zip(symbols, names, strict=True):
        match = re.search(r"kernel<(.+?) ?>\(", name.replace("moda_ext::cuda::", ""))
        short[symbol] = match[1] if match else name
    return short


def compile_and_count(source: str, arch: str, folder: Path, check: bool) -> list[dict]:
    target = str(folder / f"{Path(source).stem}_{arch}.cubin")
    log = run(tool("nvcc"), *FLAGS, f"-arch=sm_{arch}", "-Icsrc", "-cubin", source, "-o", target)
    rows = {}
    for symbol, text in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        registers = re.search(r"Used (\d+) registers", text)[1]
        rows[symbol] = {"registers": int(registers), "spill_stores": int(stores), "spill_loads": int(loads)}
    disassembler = tool("cuobjdump", required=check)
    machine_code = run(disassembler, "-sass", target) if disassembler else ""
    for symbol, text in re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", machine_code, re.DOTALL):
        rows[symbol] |= {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    names = readable(list(rows))
    return [{"kernel": names[symbol], "arch": arch, **row} for symbol, row in rows.items()]


def problems(row: dict) -> list[str]:
    if not row["kernel"].startswith(MAIN) or "float," in row["kernel"]:
        return []
    found = [f"has no {name}" for name in ("HMMA", "LDSM", "LDGSTS.128") if row.get(name) == 0]
    if row["spill_stores"] or row["spill_loads"]:
        found.append(f"spills {row['spill_stores']} bytes")
    return [f"{row['kernel']} (sm_{row['arch']}) {text}" for text in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90a"])
    parser.add_argument("--only", default="", help="part of the names of the files to compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    sources = json.loads((ROOT / "csrc/sources.json").read_text())["cuda"]
    rows = []
    columns = ["registers", "spill_stores", *INSTRUCTIONS]
    print(f"{'kernel':34}{'sm':>4}" + "".join(f"{c:>13}" for c in columns), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for source in (s for s in sources if s.endswith(".cu") and arguments.only in s):
            for arch in arguments.arch:
                for row in compile_and_count(source, arch, Path(folder), arguments.check):
                    rows.append(row)
                    print(
                        f"{row['kernel']:34}{arch:>4}" + "".join(f"{row.get(c, '-'):>13}" for c in columns), flush=True
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    faults = [text for row in rows for text in problems(row)]
    print("\n".join(faults) or "every 16-bit kernel is as it should be in what was looked at")
    if arguments.check and faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
