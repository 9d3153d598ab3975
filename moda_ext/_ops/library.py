"""Loads the native library, or says exactly why not.

native_loaded is True when the operators of torch.ops.moda_ext are registered; False means that moda_ext.reference does
the work. build_info is what the native build says of itself (csrc/bindings.cpp), None without one.

The CUDA operators are a library of their own, loaded beside a torch with CUDA. Their kernels have not run on every kind
of GPU: cuda_mode says who computes on CUDA tensors, "native" for the kernels or "reference" for moda_ext.reference, and
is "native" by default only where the kernels passed the tests (cuda_mode.py).

Environment: MODA_EXT_REQUIRE_NATIVE=1 makes a missing native library an error, MODA_EXT_DISABLE_NATIVE=1 ignores one;
MODA_EXT_CUDA=native|reference sets cuda_mode.
"""

import importlib
import importlib.util
import os
import warnings

import torch

from moda_ext._version import __version__, supports_torch, unsupported_torch

native_loaded: bool = False
build_info: dict | None = None
library_path: str | None = None
fallback_reason: str | None = None
cuda_loaded: bool = False

CUDA_MODES = ("native", "reference")


def _flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def torch_mismatch(found: str, built_for: str) -> str | None:
    """Why a native library built for torch `built_for` cannot run with torch `found`, with the fix; None if it can.

    The library uses only libtorch's stable ABI, so one binary serves every supported torch.
    """
    return (
        None if supports_torch(found) else f"{unsupported_torch(found)} (the library was built for torch {built_for})"
    )


def _load() -> None:
    """Sets the module variables above. ImportError names the cause if a native build is there but cannot be used."""
    global native_loaded, build_info, library_path, fallback_reason
    required = _flag("MODA_EXT_REQUIRE_NATIVE")
    if _flag("MODA_EXT_DISABLE_NATIVE"):
        if required:
            raise ImportError("moda_ext: both MODA_EXT_REQUIRE_NATIVE and MODA_EXT_DISABLE_NATIVE are set; unset one")
        fallback_reason = "MODA_EXT_DISABLE_NATIVE is set"
        return

    operators = importlib.util.find_spec("moda_ext._operators")
    bindings = importlib.util.find_spec("moda_ext._C")
    if operators is None and bindings is None:
        message = (
            "moda_ext: the native library is not built for this Python. "
            "Fix: run `python -m pip install .` in a checkout of moda_ext (needs a C++17 compiler)."
        )
        if required:
            raise ImportError(f"{message} (MODA_EXT_REQUIRE_NATIVE is set)")
        fallback_reason = "the native library is not built"
        warnings.warn(f"{message} Until then the slow PyTorch reference is used.", RuntimeWarning, stacklevel=2)
        return
    if operators is None or bindings is None:
        missing = "moda_ext._operators" if operators is None else "moda_ext._C"
        raise ImportError(f"moda_ext: the native build lacks {missing}. Fix: install moda_ext again.")

    info = importlib.import_module("moda_ext._C").build_info()
    if info["version"] != __version__:
        raise ImportError(
            f"moda_ext: the native library is of version {info['version']}, the Python files are of version "
            f"{__version__}. Fix: install moda_ext again."
        )
    mismatch = torch_mismatch(torch.__version__, info["torch"])
    if mismatch:
        raise ImportError(mismatch)
    try:
        torch.ops.load_library(operators.origin)
    except OSError as error:
        raise ImportError(
            f"moda_ext: cannot load {operators.origin}, built for torch {info['torch']}, with torch "
            f"{torch.__version__}: {error.__cause__ or error}. Fix: install moda_ext again with this torch installed."
        ) from error
    native_loaded, build_info, library_path = True, info, operators.origin

    _load_cuda(info)


def _load_cuda(info: dict) -> None:
    """Loads the CUDA operators where they are built and torch has CUDA; a GPU need not be there."""
    global cuda_loaded
    mode = os.environ.get("MODA_EXT_CUDA")
    if mode is not None and mode not in CUDA_MODES:
        raise ImportError(f"moda_ext: MODA_EXT_CUDA: expected one of {', '.join(CUDA_MODES)}, got {mode!r}")
    spec = importlib.util.find_spec("moda_ext._operators_cuda")
    if spec is None or torch.version.cuda is None or not info["cuda"]:
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
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(
            f"moda_ext: cannot load {spec.origin}, built for CUDA {info['cuda']}: {error.__cause__ or error}. "
            "Fix: install moda_ext again with this torch installed."
        ) from error
    cuda_loaded = True


def cuda_mode() -> str | None:
    """Who computes on CUDA tensors, see above; None without CUDA operators. Warns once where it falls back."""
    if not cuda_loaded:
        return None
    from moda_ext._ops.cuda_mode import MODE

    return MODE


def cuda_reason() -> str:
    """Why :func:`cuda_mode` is what it is."""
    if not cuda_loaded:
        return "there are no CUDA operators"
    from moda_ext._ops.cuda_mode import REASON

    return REASON


_load()
