"""What this installation is: `moda_ext.info()`, printed by `python -m moda_ext.info [--why]`."""

import platform
from collections.abc import Sequence
from importlib import metadata

import torch

from moda_ext._ops import backend, library
from moda_ext._version import TORCH_REQUIREMENT, TRANSFORMERS_BELOW, TRANSFORMERS_MIN, __version__, series


def info() -> dict:
    """Versions, what the native library was built for and whether it is loaded, as a dict of plain values.

    Keys: version, native (bool), build (one line), library (path), isa (CPU instruction set in use), isas_built (list),
    compiler, torch, torch_built_for, torch_supported, cuda (torch's, or None), cuda_built_for (None: no CUDA kernels),
    cuda_archs (list), cuda_kernels ("native", "flex" or "reference": who computes attention on CUDA tensors in float32;
    None: no CUDA kernels are loaded), transformers (its version, or None), transformers_tested (the
    tested range; with a later one each family of models proves itself when it is first used), python, platform,
    backends. What only a native build knows is None without one.

    ``backends`` tells for each operator and kind of call ("cpu", "cpu with a gradient", "cuda", "cuda float64") who
    would compute and why, as a dict with "backend" and "reason"; the backends are those of _ops/backend.py, or None
    where nobody can.
    """
    built = library.build_info or {}
    return {
        "version": __version__,
        "native": library.native_loaded,
        "build": built.get("summary", f"PyTorch reference: {library.fallback_reason}"),
        "library": library.library_path,
        "isa": built.get("isa"),
        "isas_built": built.get("isas"),
        "compiler": built.get("compiler"),
        "torch": torch.__version__,
        "torch_built_for": built.get("torch"),
        "torch_supported": TORCH_REQUIREMENT.removeprefix("torch"),
        "cuda": torch.version.cuda,
        "cuda_built_for": built.get("cuda"),
        "cuda_archs": built.get("cuda_archs"),
        "cuda_kernels": backend.explain("modular_attention", "cuda").backend if library.cuda_loaded else None,
        "transformers": _installed("transformers"),
        "transformers_tested": f">={series(TRANSFORMERS_MIN)},<{series(TRANSFORMERS_BELOW)}",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "backends": {op: _choices(op) for op in backend.OPERATORS},
    }


def _choices(op: str) -> dict[str, dict[str, str | None]]:
    kinds = {
        "cpu": backend.explain(op, "cpu"),
        "cpu with a gradient": backend.explain(op, "cpu", differentiated=True),
        "cuda": backend.explain(op, "cuda"),
        "cuda float64": backend.explain(op, "cuda", torch.float64),
    }
    return {kind: choice._asdict() for kind, choice in kinds.items()}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] = ()) -> None:
    """Prints :func:`info`; with ``--why`` also who computes what, and why."""
    unknown = set(arguments) - {"--why"}
    if unknown:
        raise SystemExit(f"moda_ext.info: unknown arguments {', '.join(sorted(unknown))}; known is --why")
    facts = info()
    backends = facts.pop("backends")
    for key, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{key:19} {'-' if text in (None, '') else text}")
    for op, choices in backends.items() if "--why" in arguments else ():
        print(f"\n{op}")
        for kind, choice in choices.items():
            print(f"  {kind:19} {choice['backend'] or 'nobody'}: {choice['reason']}")
