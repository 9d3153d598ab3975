"""Autocast: query, key and value go to the autocast dtype, as in scaled_dot_product_attention; everything else stays.

So it is in the alignment operators, whose sums, scales and weights are float32 either way. float64 is left alone.
modality_bias and sink are added to scores that are accumulated in float32, so they become float32.
"""

import torch
from torch import Tensor

from .checks import accumulation_dtype

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


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


# Which arguments of an operator are tokens, and which are added to or multiplied with sums.
_ARGUMENTS = {
    "modular_attention": ((0, 1, 2), (4, 5)),
    "modular_attention_varlen": ((0, 1, 2), (6, 7)),
    "modality_gram": ((0,), ()),
    "causal_gram_projection": ((0, 1), ()),
    "duplex_query_views": ((0, 1), ()),
    "duplex_aligned_keys": ((0,), ()),
    "duplex_attention": ((0, 1, 2, 4), (12, 13, 14)),
}
_library = torch.library.Library("moda_ext", "IMPL")  # kept alive: the registrations end with it


def register() -> None:
    """For direct callers of the operators: Autocast kernels that cast and call the operator without autocast."""
    for device_type, key in _DEVICES.items():
        for name, (tokens, sums) in _ARGUMENTS.items():
            _library.impl(name, _autocast_kernel(name, tokens, sums, device_type), key)


def _autocast_kernel(name: str, tokens: tuple[int, ...], sums: tuple[int, ...], device_type: str):
    op = getattr(torch.ops.moda_ext, name).default

    def kernel(*args):
        args = list(args)
        dtype = _region_dtype(args[0])
        for position in tokens:
            args[position] = _cast(args[position], dtype)
        for position in sums:
            args[position] = _cast(args[position], accumulation_dtype(args[0].dtype))
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return kernel
