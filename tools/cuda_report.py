"""What the compiler made of the CUDA kernels: registers, spills and shared memory, and the instructions that matter.

python3 tools/cuda_report.py [--arch 80 90a] [--json FILE] [--check]     needs nvcc, no GPU

Compiles every unit of `cuda_units` in csrc/sources.json and prints a line for each kernel and architecture: registers,
bytes spilled, bytes of shared memory of a block, and how many tensor-core products (HMMA), matrix loads from shared
memory (LDSM), 128-bit asynchronous copies (LDGSTS.128) and 128-bit loads and stores are in its machine code (- without
cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm). Shared memory is what the launch asks for in a call
with 2 modalities (shared), the kernel's own included, and with 16, the most (of 16), from the same host functions; the
rank is the largest.

--check also compiles the launches, where torch can be imported (its headers need no CUDA). It fails where a kernel
spills registers or asks for more shared memory than a block may have on every GPU that it runs on, and, where cuobjdump
is, where a 16-bit kernel of products lacks tensor-core products, matrix loads or 128-bit copies.
"""

import argparse
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_units import write_cuda_units

ROOT = Path(__file__).resolve().parents[1]
VERSION = runpy.run_path(str(ROOT / "moda_ext/_version.py"))
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", "-Werror=all-warnings", "-Xptxas=-v"]
LAUNCH_FLAGS = ["-std=c++17", "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra,-Werror", "-DUSE_CUDA=1"]
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
    *("GramKernel", "ModalityGramBackwardKernel"),
    *("CausalGramProjectionKernel", "RowGradientKernel", "LaterKernel", "KeyGradientKernel"),
    *("LatentKernel", "ViewsKernel", "IndicatorKernel"),
    *("MoveKernel", "QueryGradientKernel", "WeightGradientKernel"),
)
MODALITIES = {"shared": 2, "of 16": 16}
LARGEST_SHARED = 99 << 10  # of a block on compute capability 8.6 and 8.9; others have more
# The host's side of a kernel as the emulation compiles it: no CUDA header, and nothing of a device is called.
SHARED_PROGRAM = """
#include <stdio.h>
%(includes)s
using namespace moda_ext;
using namespace cuda;
using namespace %(arch)s;
template <class Params>
auto set_modalities(Params& params, int modalities) -> decltype(void(params.args.num_modalities = modalities)) {
  params.args.num_modalities = modalities;
}
template <class Params>
void set_modalities(Params&, ...) {}
template <class Params>
auto set_rank(Params& params, int rank) -> decltype(void(params.args.rank = rank)) {
  params.args.rank = rank;
}
template <class Params>
void set_rank(Params&, ...) {}
template <class Kernel>
void report(const char* name) {
  printf("%%s", name);
  for (const int modalities : {%(modalities)s}) {
    typename Kernel::Params params{};
    set_modalities(params, modalities);
    set_rank(params, 128);
    printf("\\t%%zu", Kernel::shared_bytes(params));
  }
  printf("\\n");
}
int main() {
%(reports)s
}
"""


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: of CUDA_HOME, else of the path, else of NVIDIA's or Triton's wheels."""
    if os.environ.get("CUDA_HOME"):
        path = Path(os.environ["CUDA_HOME"]) / "bin" / name
        if path.exists():
            return str(path)
    if shutil.which(name):
        return shutil.which(name)
    for folder in map(Path, sys.path):
        for path in (*folder.glob(f"nvidia/cu*/bin/{name}"), folder / "triton/backends/nvidia/bin" / name):
            if path.exists():
                return str(path)
    return None


def run(*command: object, **options) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if result.returncode != 0:
        raise SystemExit(f"cuda_report.py: failed: {' '.join(words)}\n{result.stdout}")
    return result.stdout


def readable(symbols: list[str]) -> dict[str, str]:
    """KeyKernel<BFloat16, 128> for a mangled entry point."""
    short = {}
    for symbol, name in zip(symbols, run("c++filt", input="\n".join(symbols)).splitlines(), strict=True):
        match = re.search(r"kernel<(.+?) ?>\(", re.sub(r"moda_ext::(cuda::(sm\d+::)?)?", "", name))
        short[symbol] = match[1] if match else name
    return short


def shared_bytes(source: str, kernels: list[str], folder: Path) -> dict[str, dict[str, int]]:
    """Dynamic shared memory of a block, by kernel and column."""
    program, binary = folder / "shared.cpp", folder / "shared"
    program.write_text(
        SHARED_PROGRAM
        % {
            "arch": Path(source).name.split("_")[0],
            "includes": "\n".join(re.findall(r'#include ".*"', (ROOT / source).read_text())),
            "modalities": ", ".join(map(str, MODALITIES.values())),
            "reports": "\n".join(f'  report<{kernel}>("{kernel}");' for kernel in kernels),
        }
    )
    options = ("-std=c++17", "-O1", "-DMODA_EXT_CUDA_EMULATION", "-Wno-unknown-pragmas", "-Icsrc")
    run(os.environ.get("CXX", "c++"), *options, program, "-o", binary)
    lines = [line.split("\t") for line in run(binary).splitlines()]
    return {kernel: dict(zip(MODALITIES, map(int, sizes), strict=True)) for kernel, *sizes in lines}


def compile_and_count(source: str, arch: str, folder: Path, disassembler: str | None) -> list[dict]:
    target = folder / f"{Path(source).stem}_{arch}.cubin"
    log = run(tool("nvcc"), *FLAGS, f"-arch=sm_{arch}", "-Icsrc", "-cubin", source, "-o", target)
    rows = {}
    for symbol, text in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        own = re.search(r"(\d+) bytes smem", text)
        rows[symbol] = {
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "static_shared": int(own[1]) if own else 0,
        }
    machine_code = run(disassembler, "-sass", target) if disassembler else ""
    for symbol, text in re.findall(r"Function : (\S+)(.*?)(?=Function :|\Z)", machine_code, re.DOTALL):
        rows[symbol] |= {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    names = readable(list(rows))
    dynamic = shared_bytes(source, list(names.values()), folder)
    for symbol, row in rows.items():
        row |= {column: row["static_shared"] + size for column, size in dynamic[names[symbol]].items()}
    return [{"kernel": names[symbol], "arch": arch, **row} for symbol, row in rows.items()]


def compile_launches(sources: list[str]) -> None:
    try:
        from torch.utils import cpp_extension
    except ImportError:
        print("Launches were not compiled: torch cannot be imported.")
        return
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    target = f"-DTORCH_TARGET_VERSION={VERSION['TORCH_TARGET_VERSION']}"
    for source in sources:
        run(tool("nvcc"), *LAUNCH_FLAGS, target, "-Icsrc", *includes, "-c", source, "-o", os.devnull)
    print(f"{len(sources)} launches compile")


def problems(row: dict) -> list[str]:
    found = []
    if row["spill_stores"] or row["spill_loads"]:
        found.append(f"spills {row['spill_stores']} bytes")
    found += [
        f"asks for {row[column]} bytes of shared memory with {modalities} modalities, {LARGEST_SHARED} are there"
        for column, modalities in MODALITIES.items()
        if row[column] > LARGEST_SHARED
    ]
    if row["kernel"].startswith(MAIN) and "float," not in row["kernel"]:
        found += [f"has no {name}" for name in ("HMMA", "LDSM", "LDGSTS.128") if row.get(name) == 0]
    return [f"{row['kernel']} (sm_{row['arch']}) {text}" for text in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90a"])
    parser.add_argument("--only", default="", help="part of the names of the files to compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if tool("nvcc") is None:
        raise SystemExit("cuda_report.py: nvcc not found. Fix: set CUDA_HOME to a CUDA toolkit.")
    disassembler = tool("cuobjdump")
    sources = json.loads((ROOT / "csrc/sources.json").read_text())
    units = write_cuda_units(ROOT, sources["cuda_units"])
    rows = []
    columns = ["registers", "spill_stores", *MODALITIES, *INSTRUCTIONS]
    print(f"{'kernel':50}{'sm':>4}" + "".join(f"{c:>13}" for c in columns), flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool,
    ):
        jobs = [
            pool.submit(compile_and_count, source, arch, Path(tempfile.mkdtemp(dir=folder)), disassembler)
            for source in units
            if arguments.only in source
            for arch in arguments.arch
        ]
        try:
            for row in itertools.chain.from_iterable(job.result() for job in jobs):
                rows.append(row)
                numbers = "".join(f"{row.get(c, '-'):>13}" for c in columns)
                print(f"{row['kernel']:50}{row['arch']:>4}{numbers}", flush=True)
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    faults = [text for row in rows for text in problems(row)]
    looked_at = "registers, shared memory and instructions" if disassembler else "registers and shared memory"
    print("\n".join(faults) or f"{looked_at}: every kernel is as it should be")
    if not disassembler:
        print("Instructions were not looked at. Fix: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if arguments.check:
        compile_launches([source for source in sources["cuda"] if source.startswith("csrc/cuda/")])
    if arguments.check and faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
