"""Loads the native library, or says exactly why not.

native_loaded is True when the operators of torch.ops.moda_ext are registered; False means that moda_ext.reference does
the work. build_info is what the native build says of itself (csrc/build_info.cpp), None without one.

The CUDA operators are a library of their own, loaded beside a torch with CUDA. They are used by default only where they
are proven (stamps.py).

Environment: MODA_EXT_REQUIRE_NATIVE=1 makes a missing native library an error, MODA_EXT_DISABLE_NATIVE=1 ignores one.
"""

import ctypes
import json
import os
import warnings
from pathlib import Path

import torch

from moda_ext._version import __version__, supports_torch, unsupported_torch

native_loaded: bool = False
build_info: dict | None = None
library_path: str | None = None
fallback_reason: str | None = None
cuda_loaded: bool = False


def _flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def torch_mismatch(found: str, built_for: str) -> str | None:
    """Why a native library built for torch `built_for` cannot run with torch `found`, with the fix; None if it can.

    The library uses only libtorch's stable ABI, so one binary serves every supported torch.
    """
    return (
        None if supports_torch(found) else f"{unsupported_torch(found)} (the library was built for torch {built_for})"
    )


def _library_file(name: str) -> Path | None:
    """A library of the native build; not what Python would import, which may be a file of an older build."""
    path = Path(__file__).resolve().parents[1] / f"{name}.abi3.so"
    return path if path.exists() else None


def _read_build_info(path: Path) -> dict:
    """What a build is, from a library that links neither torch nor Python: it loads under any of both."""
    try:
        describe = ctypes.CDLL(str(path)).moda_ext_build_info
    except (OSError, AttributeError) as error:
        raise ImportError(f"moda_ext: cannot load {path}: {error}. Fix: install moda_ext again.") from error
    describe.restype = ctypes.c_char_p
    return json.loads(describe())


def _load() -> None:
    """Sets the module variables above. ImportError names the cause if a native build is there but cannot be used."""
    global native_loaded, build_info, library_path, fallback_reason
    required = _flag("MODA_EXT_REQUIRE_NATIVE")
    if _flag("MODA_EXT_DISABLE_NATIVE"):
        if required:
            raise ImportError("moda_ext: both MODA_EXT_REQUIRE_NATIVE and MODA_EXT_DISABLE_NATIVE are set; unset one")
        fallback_reason = "MODA_EXT_DISABLE_NATIVE is set"
        return

    operators, described = _library_file("_operators"), _library_file("_build_info")
    if operators is None and described is None:
        message = (
            "moda_ext: the native library is not built. "
            "Fix: run `python -m pip install .` in a checkout of moda_ext (needs a C++17 compiler)."
        )
        if required:
            raise ImportError(f"{message} (MODA_EXT_REQUIRE_NATIVE is set)")
        fallback_reason = "the native library is not built"
        warnings.warn(f"{message} Until then the slow PyTorch reference is used.", RuntimeWarning, stacklevel=2)
        return
    if operators is None or described is None:
        missing = "moda_ext._operators" if operators is None else "moda_ext._build_info"
        raise ImportError(f"moda_ext: the native build lacks {missing}. Fix: install moda_ext again.")

    info = _read_build_info(described)
    if info["version"] != __version__:
        raise ImportError(
            f"moda_ext: the native library is of version {info['version']}, the Python files are of version "
            f"{__version__}. Fix: install moda_ext again."
        )
    mismatch = torch_mismatch(torch.__version__, info["torch"])
    if mismatch:
        raise ImportError(mismatch)
    try:
        torch.ops.load_library(str(operators))
    except OSError as error:
        raise ImportError(
            f"moda_ext: cannot load {operators}, built for torch {info['torch']}, with torch "
            f"{torch.__version__}: {error.__cause__ or error}. Fix: install moda_ext again with this torch installed."
        ) from error
    native_loaded, build_info, library_path = True, info, str(operators)

    _load_cuda(info)


def _load_cuda(info: dict) -> None:
    """Loads the CUDA operators where they are built and torch has CUDA; a GPU need not be there."""
    global cuda_loaded
    operators = _library_file("_operators_cuda")
    if operators is None or torch.version.cuda is None or not info["cuda"]:
        return
    if torch.version.cuda.split(".")[0] != info["cuda"].split(".")[0]:
        warnings.warn(
            f"moda_ext: the CUDA operators are built for CUDA {info['cuda']}, this torch is for CUDA "
            f"{torch.version.cuda}: they are not loaded. Fix: install moda_ext again with this torch installed.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    try:
        torch.ops.load_library(str(operators))
    except OSError as error:
        raise ImportError(
            f"moda_ext: cannot load {operators}, built for CUDA {info['cuda']}: {error.__cause__ or error}. "
            "Fix: install moda_ext again with this torch installed."
        ) from error
    cuda_loaded = True


def files() -> list[Path]:
    """The libraries that are loaded."""
    names = ("_operators", "_operators_cuda") if cuda_loaded else ("_operators",) if native_loaded else ()
    return [path for name in names if (path := _library_file(name)) is not None]


_load()
