"""Why native operators are not in use on the GPUs of this process, decided when the first tensor of a GPU comes.

A module and no function that remembers: torch.compile runs an import while it traces, and takes what it finds there for
constant. (torch.compiler.assume_constant_result would import torch._dynamo, which takes as long as torch itself.)
"""

from moda_ext._ops import operators, stamps

OBSTACLES: dict[str, str] = stamps.obstacles_on_gpus(operators.DECLARED)
