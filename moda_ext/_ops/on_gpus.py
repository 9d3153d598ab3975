"""What cannot run on the GPUs of this process, or is not trusted there: found out when the first tensor of one comes.

A module and no function that remembers: torch.compile runs an import while it traces, and takes what it finds there for
constant. (torch.compiler.assume_constant_result would import torch._dynamo, which takes as long as torch itself.)
"""

import importlib.util

import torch

from moda_ext._ops import operators, stamps

LEAST_FOR_TRITON = (7, 0)


def _obstacle_of_triton() -> str | None:
    """Why FlexAttention has no kernels on these GPUs."""
    if not torch.cuda.is_available():
        return None
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # something else goes by that name
        found = False
    if not found:
        return "FlexAttention needs triton on a GPU, which is not installed"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if torch.version.hip is None and oldest < LEAST_FOR_TRITON:
        return f"FlexAttention needs compute capability 7.0, and a GPU here has {oldest[0]}.{oldest[1]}"
    return None


NATIVE_OBSTACLES: dict[str, str] = stamps.obstacles_on_gpus(operators.DECLARED)  # by operator
FLEX_OBSTACLE: str | None = _obstacle_of_triton()
