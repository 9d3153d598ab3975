"""What the files of the reference share: ids of modalities, the dtype of sums, results on demand."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A tensor, or the tuple that flags ask for: which of them a type checker cannot see.
Results: TypeAlias = Tensor | Any


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def members(op: str, name: str, modality: Tensor, num_modalities: int) -> Tensor:
    """(B, N, M): whether token j is of modality m. ValueError for an id outside [-1, M) that can be read."""
    modality = modality.long()  # an unsigned number is never below -1
    raise_if_on_host(
        lambda: (modality < -1) | (modality >= num_modalities),
        f"{op}: {name} must lie in [-1, {num_modalities}), with -1 for padding (num_modalities)",
    )
    return modality[..., None] == torch.arange(num_modalities, device=modality.device)


def pack_results(out: Tensor, lse: Tensor, mass: Tensor, return_lse: bool, return_mass: bool) -> Results:
    """out, or the tuple (out[, lse][, mass]) that was asked for."""
    if not (return_lse or return_mass):
        return out
    return (out, *((lse,) if return_lse else ()), *((mass,) if return_mass else ()))


def raise_if_on_host(violated: Callable[[], Tensor], message: str) -> None:
    """ValueError(message) when the boolean tensor ``violated()`` holds anywhere, wherever reading it costs no sync.

    Not while compiling; under vmap or with fake tensors there is no value to read; on another device it would wait.
    """
    if torch.compiler.is_compiling():
        return
    condition = violated()
    if condition.device.type != "cpu":
        return
    try:
        found = bool(condition.any())
    except RuntimeError:
        return
    if found:
        raise ValueError(message)
