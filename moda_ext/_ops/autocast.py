"""Autocast: query, key and value go to the autocast dtype, as in scaled_dot_product_attention; everything else stays.

So it is in the alignment operators, whose sums, scales and weights are float32 either way. float64 is left alone.
modality_bias and sink are added to scores that are accumulated in float32, so they become float32.
"""

import torch
from torch import Tensor

from .checks import accumulation_dtype

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)
# Operators of which nothing but the first few arguments, queries and keys, is cast.
_TOKENS = {"modality_gram": 1, "causal_gram_projection": 2, "duplex_query_views": 2, "duplex_aligned_keys": 1}


def cast_inputs(query, key, value, modality_bias, sink):
    """The five floating-point arguments as an autocast region wants them; unchanged outside one. Differentiable."""
    dtype = _region_dtype(query)
    if dtype is None:
        return query, key, value, modality_bias, sink
    query, key, value = (_cast(t, dtype) for t in (query, key, value))
    bias_dtype = accumulation_dtype(query.dtype)
    return query, key, value, _cast(modality_bias, bias_dtype), _cast(sink, bias_dtype)


def cast_tokens(*tensors):
    """Queries and keys of the alignment operators as an autocast region wants them; unchanged outside one."""
    dtype = _region_dtype(tensors[0])
    return tensors if dtype is None else tuple(_cast(t, dtype) for t in tensors)


def _region_dtype(tensor) -> torch.dtype | None:
    """The dtype that an autocast region gives to tensors on the device of this one; None outside one."""
    device_type = tensor.device.type if isinstance(tensor, Tensor) else ""
    if device_type not in _DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor, dtype: torch.dtype):
    return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in _CASTABLE else tensor


def register() -> None:
    """For direct callers of the operators: Autocast kernels that cast and call the operator without autocast."""
    for device_type, key in _DEVICES.items():
        for name, bias_position in (("modular_attention", 4), ("modular_attention_varlen", 6)):
            _library.impl(name, _autocast_kernel(name, bias_position, device_type), key)
        for name, count in _TOKENS.items():
            _library.impl(name, _autocast_tokens_kernel(name, count, device_type), key)


_library = torch.library.Library("moda_ext", "IMPL")  # kept alive: the registrations end with it


def _autocast_kernel(name: str, bias_position: int, device_type: str):
    op = getattr(torch.ops.moda_ext, name).default

    def kernel(*args):
        args = list(args)
        positions = (0, 1, 2, bias_position, bias_position + 1)
        for position, tensor in zip(positions, cast_inputs(*(args[p] for p in positions)), strict=True):
            args[position] = tensor
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return kernel


def _autocast_tokens_kernel(name: str, count: int, device_type: str):
    op = getattr(torch.ops.moda_ext, name).default

    def kernel(*args):
        tokens = cast_tokens(*args[:count])
        with torch.autocast(device_type, enabled=False):
            return op(*tokens, *args[count:])

    return kernel
