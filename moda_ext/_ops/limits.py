"""What the operators take, on every backend but the reference: dtypes, sizes, and the dtype in which they sum."""

import torch

MAX_MODALITIES = 16
MAX_HEAD_SIZE = 256
HEAD_SIZE_STEP = 8  # one AVX2 vector of float32, one 16-byte load of bfloat16
MAX_RANK = 128

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
OFFSETS = (torch.int32, torch.int64)

KEY_NORMS = ("l2", None)
NORMALIZATIONS = ("trace", "frobenius", "row")  # in the order of duplex_aligned_keys, csrc/ops/schemas.cpp


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, mass, modality_bias, sink and Grams: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32
