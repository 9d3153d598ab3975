"""Autocast: query, key and value go to the autocast dtype, as in scaled_dot_product_attention; everything else stays.

So it is in the alignment operators, whose sums, scales and weights are float32 either way. float64 is left alone.
modality_bias and sink are added to scores that are accumulated in float32, so they become float32.
"""

import contextlib
from typing import TypeVar

import torch
from torch import Tensor

from moda_ext._ops.limits import accumulation_dtype

DISPATCH_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
_Given = TypeVar("_Given", Tensor, Tensor | None)


def cast_tokens(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as an autocast region wants them; unchanged outside one. Differentiable."""
    dtype = region_dtype(tensors[0])
    return tensors if dtype is None else tuple(_cast(tensor, dtype) for tensor in tensors)


def cast_sums(query: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What is added to or multiplied with sums over the tokens of a query that was cast, or None."""
    if region_dtype(query) is None:
        return tensors
    return tuple(_cast(tensor, accumulation_dtype(query.dtype)) for tensor in tensors)


def suspended(tensor: Tensor) -> contextlib.AbstractContextManager:
    """No autocast, for what runs on tokens that were cast already: products of sums stay in the dtype of sums."""
    if region_dtype(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def region_dtype(tensor: object) -> torch.dtype | None:
    """The dtype that an autocast region gives to tensors on the device of this one; None outside one."""
    device_type = tensor.device.type if isinstance(tensor, Tensor) else ""
    if device_type not in DISPATCH_KEYS or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor: _Given, dtype: torch.dtype) -> _Given:
    return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in _CASTABLE else tensor
