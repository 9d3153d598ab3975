"""Conditions on arguments: each function raises unless it holds, naming the operator, the argument, and what came.

Only what tensors say about themselves (rank, sizes, dtype, device) is looked at, never their values: a check costs no
device synchronisation, and torch.compile turns it into guards. Shapes and options raise ValueError, dtypes and
non-tensors TypeError, and what no kernel can run NotImplementedError with the reason and the remedy.
"""

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from moda_ext._ops.limits import HEAD_SIZE_STEP, INTEGERS, MAX_HEAD_SIZE, MAX_MODALITIES


def tensor(op: str, name: str, argument: object) -> None:
    if not isinstance(argument, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(argument).__name__}")


def dtype(op: str, name: str, tensor: Tensor, allowed: Collection[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {name} must have one of the dtypes {names(allowed)}, got {tensor.dtype}")


def device(op: str, name: str, tensor: Tensor, other: Tensor, other_name: str = "query") -> None:
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def rank(op: str, name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {name} must have shape {layout}, got {tensor.dim()} dimensions, {tuple(tensor.shape)}")


def shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], layout: str) -> None:
    """Size by size: comparing whole shapes would make torch.export fix every one of them."""
    equal = tensor.dim() == len(expected)
    for size, other in zip(tensor.shape, expected, strict=False):
        equal = equal and size == other
    if not equal:
        mismatch(op, name, f"the shape {layout}", expected, tuple(tensor.shape))


def broadcastable(op: str, name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    """As :func:`shape`, size by size."""
    given = tensor.shape
    missing = len(shape) - len(given)
    broadcasts = missing >= 0
    if broadcasts:
        for size, target in zip(given, shape[missing:], strict=True):
            if size != target and size != 1:
                broadcasts = False
                break
    if not broadcasts:
        mismatch(op, name, f"a shape that broadcasts to {layout}", tuple(shape), tuple(given))


def token_ids(op: str, name: str, modality: Tensor, tokens: Tensor, tokens_name: str, layout: str) -> None:
    tensor(op, name, modality)
    dtype(op, name, modality, INTEGERS)
    device(op, name, modality, tokens, tokens_name)
    shape(op, name, modality, (tokens.shape[0], tokens.shape[2]), layout)


def head_size(op: str, name: str, head_size: int, padding: str = "Pad with zeros") -> None:
    if head_size < HEAD_SIZE_STEP or head_size > MAX_HEAD_SIZE or head_size % HEAD_SIZE_STEP != 0:
        raise NotImplementedError(
            f"{op}: {name} has head size {head_size}, but the kernels take multiples of {HEAD_SIZE_STEP} from "
            f"{HEAD_SIZE_STEP} to {MAX_HEAD_SIZE}. {padding}, or call moda_ext.reference.{op}, which takes any size"
        )


def multiple_of(op: str, heads: int, kv_heads: int, name: str) -> None:
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"{op}: the heads of query must be a multiple of the heads of {name} (GQA, at least one), "
            f"got {heads} query heads and {kv_heads} {name} heads"
        )


def num_modalities(op: str, num_modalities: int) -> None:
    if not is_integer(num_modalities):
        raise TypeError(f"{op}: num_modalities must be an int, got {type(num_modalities).__name__}")
    if num_modalities < 1 or num_modalities > MAX_MODALITIES:
        raise ValueError(f"{op}: num_modalities must lie in 1 to {MAX_MODALITIES}, got {num_modalities}")


def count(op: str, name: str, value: int) -> None:
    if not is_integer(value):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {value}")


def positive(op: str, name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{op}: {name} must be above 0, got {value}")
    if not is_finite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def choice(op: str, name: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def mismatch(op: str, name: str, what: str, expected: object, got: object) -> None:
    raise ValueError(f"{op}: {name} must have {what}: expected {expected}, got {got}")


def same_device(device: torch.device, other: torch.device) -> bool:
    return device.type == other.type and (other.index is None or other.index == device.index)


def is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def is_finite(value: float) -> bool:
    """Of a number. A symbolic one is not asked: torch.compile would make a guard of the answer."""
    return isinstance(value, torch.SymInt | torch.SymFloat) or math.isfinite(value)


def names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def ids(op: str, name: str, modality: Tensor, num_modalities: int) -> None:
    """ValueError for an id outside [-1, num_modalities), as :func:`on_host`."""
    if torch.compiler.is_compiling() or modality.device.type != "cpu" or modality.numel() == 0:
        return
    try:
        least, most = (int(bound) for bound in modality.aminmax())
    except RuntimeError:  # no value to read, see on_host
        return
    if least < -1 or most >= num_modalities:
        raise ValueError(f"{op}: {name} must lie in [-1, {num_modalities}), with -1 for padding (num_modalities)")


def on_host(violated: Tensor, message: str) -> None:
    """ValueError(message) where the boolean tensor ``violated`` holds anywhere, wherever reading it costs no sync.

    Not while compiling; under vmap or with fake tensors there is no value to read; on another device it would wait.
    """
    if torch.compiler.is_compiling() or violated.device.type != "cpu":
        return
    try:
        found = bool(violated.any())
    except RuntimeError:
        return
    if found:
        raise ValueError(message)
