"""On which GPUs the CUDA kernels are proven, and whether those of this process are: decided when it is first needed.

A module and no function that remembers: torch.compile runs an import while it traces, and takes what it finds there for
constant. (torch.compiler.assume_constant_result would import torch._dynamo, which takes as long as torch itself.)
"""

import torch

CAPABILITIES: frozenset[tuple[int, int]] = frozenset()  # compute capabilities on which the test suite passed


def _obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU to use the kernels on"
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    unverified = ", ".join(f"{major}.{minor}" for major, minor in sorted(found - CAPABILITIES))
    return f"the CUDA kernels have not been verified on compute capability {unverified}" if unverified else None


OBSTACLE = _obstacle()
