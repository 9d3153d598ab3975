"""Builds the native parts: the operator library `moda_ext._operators` and the pybind11 module `moda_ext._C`.

csrc/sources.json lists the sources. CPU kernels include no torch header and are compiled once for each instruction set,
as static libraries with flags of their own; both extensions link them. The rest of the package is in pyproject.toml.
"""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # the build needs none
warnings.filterwarnings("ignore", "Editable installation")  # setuptools' general advice, shown on every install
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"moda_ext: cannot import torch, which the build compiles against ({error}). "
        "Fix: python -m pip install torch, then build again."
    ) from error

ROOT = Path(__file__).resolve().parent
SOURCES = json.loads((ROOT / "csrc/sources.json").read_text())
VERSION = runpy.run_path(str(ROOT / "moda_ext/_version.py"))
GENERATED = ROOT / "build" / "generated"
OBJECTS = ROOT / "build" / f"objects-{sys.implementation.cache_tag}"  # setuptools would put those of -e into /tmp
IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")


def check_toolchain() -> None:
    """Ends the build with the fix when what pip cannot install is missing."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise SystemExit("moda_ext: the headers of this Python are missing. Fix: install them (Debian: python3-dev).")
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise SystemExit("moda_ext: no C++ compiler found. Fix: install one (Debian: g++), or set CXX.")


def parallel_jobs() -> int:
    """MAX_JOBS of the environment, else one job for each core that finds 2 GB of free memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free_gb = 4
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(free_gb / 2)))


def compiles_here(group: dict) -> bool:
    """Whether this machine's compiler can build a kernel group: AMX came with GCC 11 and Clang 12, and needs Linux."""
    if group["isa"] not in SOURCES["x86_64_isas"]:
        return True
    if not IS_X86_64 or (group["isa"] == "amx" and platform.system() != "Linux"):
        return False
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, *group["flags"], "-x", "c++", "-fsyntax-only", os.devnull]
    return group["isa"] != "amx" or subprocess.run(command, capture_output=True, check=False).returncode == 0


def build_summary() -> str:
    """One line that says what kind of build this is and why."""
    if torch.version.cuda is None:
        return f"CPU build: torch {torch.__version__} has no CUDA"
    if not cpp_extension.CUDA_HOME:
        return f"CPU build: no nvcc found (set CUDA_HOME to a CUDA {torch.version.cuda} toolkit)"
    return "CPU build: this version of moda_ext has no CUDA kernels"


def write_build_info(isas: list[str]) -> None:
    """Writes what bindings.cpp reports: a header, as the values hold spaces; untouched if equal, or all recompiles."""
    values = {
        "VERSION": VERSION["__version__"],
        "TORCH": torch.__version__,
        "CUDA": "",  # of the compiled kernels, not of torch
        "CUDA_ARCHS": "",
        "SUMMARY": build_summary(),
        "ISAS": " ".join(isas),
    }
    lines = [f"#define MODA_EXT_BUILD_{key} {json.dumps(value)}\n" for key, value in values.items()]
    text = "".join(["#pragma once\n", *lines])
    header = GENERATED / "moda_ext_build_info.h"
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


class BuildKernels(build_clib):
    """build_clib that compiles its libraries in parallel: the kernels are most of the build time."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = self.build_clib = str(OBJECTS)

    def build_libraries(self, libraries):
        build_one = super().build_libraries
        with ThreadPoolExecutor(parallel_jobs()) as pool:
            list(pool.map(lambda library: build_one([library]), libraries))


class BuildExtensions(cpp_extension.BuildExtension):
    """torch's build_ext (ninja, parallel, incremental)."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(OBJECTS)


check_toolchain()
os.environ["MAX_JOBS"] = str(parallel_jobs())  # ninja, run by torch's BuildExtension, reads it
target_major, target_minor = VERSION["TORCH_MIN"]
flags = ["-std=c++17", "-g0", "-fvisibility=hidden"]
headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
depends = [*headers, "csrc/sources.json", "setup.py"]
kernels = [group for group in SOURCES["kernels"] if compiles_here(group)]
isas = [group["isa"] for group in kernels if group["isa"] != "any"]
macros = [("MODA_EXT_X86_TIERS", "1")] if "avx512" in isas else []
macros += [("MODA_EXT_AMX_TIER", "1")] if "amx" in isas else []

libraries = [
    (
        f"moda_ext_{Path(source).stem}",
        {
            "sources": [source],
            "include_dirs": ["csrc"],
            "macros": macros,
            "cflags": [*flags, *SOURCES["kernel_flags"], *group["flags"]],
            "obj_deps": {"": depends},
        },
    )
    for group in kernels
    for source in group["sources"]
]

operators = Extension(
    "moda_ext._operators",  # no Python inside: moda_ext._ops.library loads it with torch.ops.load_library
    SOURCES["operators"],
    include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
    library_dirs=cpp_extension.library_paths(),
    libraries=["torch", "torch_cpu", "c10"],
    define_macros=[*macros, ("TORCH_TARGET_VERSION", f"0x{target_major:02x}{target_minor:02x}000000000000ULL")],
    extra_compile_args=[*flags, "-O3"],
    extra_link_args=["-Wl,--no-undefined"] if platform.system() == "Linux" else [],  # fail here, not at import
    depends=depends,
    language="c++",
)

bindings = Extension(
    "moda_ext._C",  # links no torch, so it can be asked what it was built for under any torch
    SOURCES["bindings"],
    include_dirs=[str(ROOT / "csrc"), str(GENERATED), *cpp_extension.include_paths()],  # torch's own pybind11 headers
    define_macros=macros,
    extra_compile_args=flags,
    depends=depends,
    language="c++",
)

write_build_info(isas)
print(f"moda_ext: {build_summary()}", flush=True)
setup(
    install_requires=[VERSION["TORCH_REQUIREMENT"], "numpy"],  # torch warns at import when numpy is missing
    libraries=libraries,
    ext_modules=[operators, bindings],
    cmdclass={"build_clib": BuildKernels, "build_ext": BuildExtensions},
)
