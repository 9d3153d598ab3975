"""Builds the native parts: the operator library `moda_ext._operators` and `moda_ext._build_info`, which describes it.

No library uses Python's C API: one wheel, tagged abi3, serves every Python, and the build needs no Python headers.

csrc/sources.json lists the sources; those that instantiate CUDA kernels are made from its table of head sizes. CPU
kernels include no torch header and are compiled once for each instruction set, as static libraries with flags of their
own, which both libraries link. Where torch has CUDA and its compiler is there, the CUDA operators become a third
library, `moda_ext._operators_cuda`; that takes no GPU. The rest of the package is in pyproject.toml.

Environment: MAX_JOBS limits parallel compilation, TORCH_CUDA_ARCH_LIST names the GPU architectures (by default the
visible GPU's, else DEFAULT_CUDA_ARCHS), CUDA_HOME the toolkit, MODA_EXT_BUILD_CUDA=0 leaves CUDA out and =1 demands it.
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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
write_cuda_units = runpy.run_path(str(ROOT / "tools/cuda_units.py"))["write_cuda_units"]
GENERATED = ROOT / "build" / "generated"
OBJECTS = ROOT / "build" / f"objects-{sys.implementation.cache_tag}"  # setuptools would put those of -e into /tmp

if not VERSION["supports_torch"](torch.__version__):  # now, and not when what was compiled is imported
    raise SystemExit(VERSION["unsupported_torch"](torch.__version__))


def check_tree() -> None:
    """Ends the build with the fix where setuptools could not write beside the sources."""
    try:
        GENERATED.mkdir(parents=True, exist_ok=True)
        for folder in (ROOT, GENERATED):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(
            f"moda_ext: the build writes into its source tree, and {ROOT} cannot be written ({error}). "
            "Fix: copy the tree to a place that can be, and build there."
        ) from error


def check_toolchain() -> None:
    """Ends the build with the fix when what pip cannot install is missing."""
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


def machines() -> set[str]:
    """The processors built for, of which macOS may have two in one library: ARCHFLAGS names them, else Python's flags.

    Not run on macOS yet.
    """
    flags = os.environ.get("ARCHFLAGS") or sysconfig.get_config_var("CFLAGS") or ""
    named = re.findall(r"-arch\s+(\w+)", flags) if platform.system() == "Darwin" else []
    return set(named) or {platform.machine().lower()}


def compiles_here(group: dict) -> bool:
    """Whether this machine's compiler can build a kernel group.

    AVX512_BF16 came with GCC 10 and Clang 9, BF16 of ARM with GCC 10 and Clang 11, AMX with GCC 11 and Clang 12, and
    needs Linux. A library for several processors has what every one of them has by itself: it is compiled once, with
    one set of flags.
    """
    isa = group["isa"]
    if isa not in SOURCES["x86_64_isas"] + SOURCES["aarch64_isas"]:
        return True
    processors = {"x86_64", "amd64"} if isa in SOURCES["x86_64_isas"] else {"aarch64", "arm64"}
    if not machines() <= processors or (isa == "amx" and platform.system() != "Linux"):
        return False
    compiler = os.environ.get("CXX", "c++").split()
    flags = os.environ.get("ARCHFLAGS", "").split() + group["flags"]
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    newer = isa in ("avx512_bf16", "neon_bf16", "amx")
    return not newer or subprocess.run(command, capture_output=True, check=False).returncode == 0


# Machine code for A100 and relatives (8.x) and for Hopper; newer GPUs compile the PTX of 8.0 when they first load it.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"


def missing_for_cuda() -> str | None:
    """Why the CUDA operators cannot be built, None if they can."""
    if os.environ.get("MODA_EXT_BUILD_CUDA") == "0":
        return "MODA_EXT_BUILD_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    home = cuda_home()
    if home is None:
        return f"no nvcc found (set CUDA_HOME to a CUDA {torch.version.cuda} toolkit)"
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if not found or found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {'.'.join(found.groups()) if found else '?'}, torch of CUDA {torch.version.cuda}"
    return None


def cuda_home() -> Path | None:
    """CUDA_HOME, else where the nvcc of the path says it is (it may be a wrapper, whose own place says nothing)."""
    if os.environ.get("CUDA_HOME"):
        home = Path(os.environ["CUDA_HOME"])
        return home if (home / "bin" / "nvcc").exists() else None
    if shutil.which("nvcc") is None:
        return None
    steps = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    place = re.search(r"^#\$ _HERE_=(.+)$", steps, re.MULTILINE)
    return Path(place[1]).parent if place else None


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST, else what the visible GPUs are, else the default."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = [f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "") for major, minor in sorted(found)]
    return ";".join(names) or DEFAULT_CUDA_ARCHS


def build_summary() -> str:
    """One line that says what kind of build this is and why."""
    if missing_cuda is None:
        return f"CUDA {torch.version.cuda} build for {os.environ['TORCH_CUDA_ARCH_LIST']}"
    return f"CPU build: {missing_cuda}"


def write_build_info() -> None:
    """Writes the header with what build_info.cpp reports; untouched if equal, or all would be compiled again."""
    values = {
        "version": VERSION["__version__"],
        "summary": build_summary(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if missing_cuda is None else None,  # of the compiled kernels
        "cuda_archs": re.findall("[^;, ]+", os.environ["TORCH_CUDA_ARCH_LIST"]) if missing_cuda is None else [],
    }
    fields = json.dumps(values)[1:-1]
    others = "".join(f', "{isa}"' for isa in isas if isa != "baseline")  # whose name the processor says
    text = f"#pragma once\n#define MODA_EXT_BUILD_FIELDS {json.dumps(fields)}\n"
    text += f"#define MODA_EXT_OTHER_ISAS {json.dumps(others)}\n"
    header = GENERATED / "moda_ext_build_info.h"
    if not header.exists() or header.read_text() != text:
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

    def run(self):
        # What an earlier build left, under other names or with other parts, would go into the wheel.
        paths = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        built = {path.name for path in paths}
        for folder in {paths[0].parent, Path(self.build_lib) / "moda_ext"}:
            for old in folder.glob("*.so"):
                if old.name not in built:
                    old.unlink()
        super().run()


check_tree()
check_toolchain()
missing_cuda = missing_for_cuda()
if missing_cuda is None:
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()  # torch's BuildExtension reads it
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(cuda_home())
elif os.environ.get("MODA_EXT_BUILD_CUDA") == "1":
    raise SystemExit(f"moda_ext: MODA_EXT_BUILD_CUDA=1, but {missing_cuda}.")
cuda_units = write_cuda_units(ROOT, SOURCES["cuda_units"]) if missing_cuda is None else []
os.environ["MAX_JOBS"] = str(parallel_jobs())  # ninja, run by torch's BuildExtension, reads it
flags = ["-std=c++17", "-g0", "-fvisibility=hidden"]
headers = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")]
depends = [*headers, "csrc/sources.json", "setup.py"]
kernels = [group for group in SOURCES["kernels"] if compiles_here(group)]
isas = [group["isa"] for group in kernels if group["isa"] != "any"]
macros = [("MODA_EXT_X86_ISAS", "1")] if "avx512" in isas else []
macros += [("MODA_EXT_PAIRS_ISA", "1")] if {"avx512_bf16", "neon_bf16"} & set(isas) else []
macros += [("MODA_EXT_AMX_ISA", "1")] if "amx" in isas else []

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
    "moda_ext._operators",  # moda_ext._ops.library loads it with torch.ops.load_library
    SOURCES["operators"],
    include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
    library_dirs=cpp_extension.library_paths(),
    libraries=["torch", "torch_cpu", "c10"],
    define_macros=[*macros, ("TORCH_TARGET_VERSION", VERSION["TORCH_TARGET_VERSION"])],
    extra_compile_args=[*flags, "-O3"],
    extra_link_args=["-Wl,--no-undefined"] if platform.system() == "Linux" else [],  # fail here, not at import
    depends=depends,
    language="c++",
    py_limited_api=True,
)

cuda_operators = Extension(
    "moda_ext._operators_cuda",  # apart, because what links CUDA cannot load in a torch without it
    [*SOURCES["cuda"], *cuda_units],
    include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths("cuda" if missing_cuda is None else "cpu")],
    library_dirs=cpp_extension.library_paths("cuda" if missing_cuda is None else "cpu"),
    libraries=["torch", "torch_cpu", "torch_cuda", "c10", "cudart"],
    define_macros=[
        ("TORCH_TARGET_VERSION", VERSION["TORCH_TARGET_VERSION"]),
        ("USE_CUDA", "1"),  # declares the stream of the stable ABI
    ],
    extra_compile_args={
        "cxx": [*flags, "-O3"],
        "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", "-Werror=all-warnings"],
    },
    extra_link_args=["-Wl,--no-undefined"] if platform.system() == "Linux" else [],
    depends=depends,
    language="c++",
    py_limited_api=True,
)

build_info = Extension(
    "moda_ext._build_info",  # links no torch, so it can be asked what it was built for under any torch
    SOURCES["build_info"],
    include_dirs=[str(ROOT / "csrc"), str(GENERATED)],
    define_macros=macros,
    extra_compile_args=flags,
    depends=depends,
    language="c++",
    py_limited_api=True,
)

extras = {
    "demo": ["matplotlib>=3.8", "numpy", "pillow", "tqdm"],
    "bench": ["numpy", "tqdm"],
    "transformers": ["pillow", "safetensors", VERSION["TRANSFORMERS_REQUIREMENT"]],
    "diagnostics": ["matplotlib>=3.8", "pandas", "pillow"],
    "evaluation": ["matplotlib>=3.8", "pillow", "scipy"],
    "vllm": ["prometheus_client", "psutil", "rich", "typer", f"vllm{VERSION['VLLM_REQUIREMENT']}"],
    "lmms": [*VERSION["LMMS_EVAL_REQUIREMENTS"], "moda_ext[transformers]"],
    "cli": ["moda_ext[demo,diagnostics,evaluation,transformers]", "rich", "typer"],
    "train": ["accelerate", "datasets", "gguf", "moda_ext[cli]", "peft", "pyyaml", "tensorboard"],
    "test": ["cmake>=3.25", "hypothesis", "ninja", "numpy", "pytest", "pytest-xdist"],
    # Without these, their tests are skipped; those of the report also want Chromium (Debian: chromium).
    "test-transformers": [
        "accelerate",
        "gguf",
        "moda_ext[cli,transformers]",
        "peft",
        "pillow",
        "pyyaml",
        "tensorboard",
    ],
}

write_build_info()
print(f"moda_ext: {build_summary()}", flush=True)
setup(
    install_requires=[VERSION["TORCH_REQUIREMENT"], "numpy"],  # torch warns at import when numpy is missing
    extras_require=extras,
    libraries=libraries,
    ext_modules=[operators, build_info, *([cuda_operators] if missing_cuda is None else [])],
    cmdclass={"build_clib": BuildKernels, "build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # requires-python of pyproject.toml
)
