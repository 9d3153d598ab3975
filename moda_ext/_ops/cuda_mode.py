"""Who computes on CUDA tensors in this process, and why: decided when this is first imported, that is, needed.

A module and no function that remembers: torch.compile runs an import while it traces, and takes what it finds there for
constant. (torch.compiler.assume_constant_result would import torch._dynamo, which takes as long as torch itself.)
"""

import os
import warnings

import torch

VERIFIED_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()  # compute capabilities on which the test suite passed


def _decide() -> tuple[str, str]:
    asked = os.environ.get("MODA_EXT_CUDA")
    if asked:
        return asked, f"MODA_EXT_CUDA={asked} is set"
    if not torch.cuda.is_available():
        return "reference", "there is no GPU to use the kernels on"
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if capabilities <= VERIFIED_CAPABILITIES:
        return "native", "the kernels are verified on this GPU"
    unverified = ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities - VERIFIED_CAPABILITIES))
    reason = f"the CUDA kernels have not been verified on compute capability {unverified}"
    warnings.warn(
        f"moda_ext: {reason}; CUDA tensors go to moda_ext.reference, which is slow and takes O(Nq Nk) memory. To use "
        "the kernels set MODA_EXT_CUDA=native (tools/gpu.py tests them); MODA_EXT_CUDA=reference keeps this and "
        "silences the warning.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference", reason


MODE, REASON = _decide()
