"""Argument checks of the public functions, the same for the native operators and for the reference fallback.

Only what tensors say about themselves (rank, sizes, dtype, device) is looked at, never their values: a check costs no
device synchronisation, and torch.compile turns it into guards. Shapes and options raise ValueError, dtypes and
non-tensors TypeError, and what no kernel can run NotImplementedError with the reason and the remedy.
"""

import math

import torch
from torch import Tensor

from . import library

MAX_MODALITIES = 16
MAX_HEAD_SIZE = 256
HEAD_SIZE_STEP = 8  # one AVX2 vector of float32, one 16-byte load of bfloat16

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
OFFSETS = (torch.int32, torch.int64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, mass, modality_bias and sink: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Devices with native kernels; a meta tensor is answered by the fake kernels.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": None}
NATIVE_DEVICES = frozenset(
    device
    for device, key in _DISPATCH_KEYS.items()
    if library.native_loaded
    and (key is None or torch._C._dispatch_has_kernel_for_dispatch_key("moda_ext::modular_attention", key))
)


def runs_natively(op: str, device: torch.device, argument: str = "query", dtype: torch.dtype | None = None) -> bool:
    """Whether the native operators (True) or the reference (False) take tensors on ``device``.

    The reference does without a native library, and on CUDA for float64, which has no kernels, and where the kernels
    are not to be used (library.cuda_mode).
    """
    if not library.native_loaded:
        return False
    if device.type == "cuda" and (dtype == torch.float64 or library.cuda_mode() == "reference"):
        return False
    if device.type not in NATIVE_DEVICES:
        raise NotImplementedError(
            f"{op}: {argument} is on {device}, and this build of moda_ext has no kernels for {device.type}; install it "
            f"again where the compiler for that device is found (python -m moda_ext.info shows what was built), or "
            f"call moda_ext.reference.{op}, which runs on any device, with O(Nq Nk) memory"
        )
    return True


def dense(
    query, key, value, key_modality, modality_bias, sink, num_modalities, is_causal, scale, op="modular_attention"
) -> None:
    """Raise unless ``modular_attention`` can run these arguments (after the autocast conversion)."""
    _attention_options(op, num_modalities, is_causal, scale)
    _tensors(op, query, key, value, key_modality, modality_bias, sink)
    _views(op, query, 4, num_modalities, "(B, Hq, Nq, D)")
    _rank(op, "key", key, 4, "(B, Hkv, Nk, D)")
    _rank(op, "value", value, 4, "(B, Hkv, Nk, D)")
    batch, heads, rows, head_size = query.shape[-4:]
    kv_heads, columns = key.shape[1], key.shape[2]
    if key.shape[0] != batch:
        _mismatch(op, "key", "the batch size of query", batch, key.shape[0])
    _kv_shapes(op, heads, head_size, kv_heads, key, value)
    _rank(op, "key_modality", key_modality, 2, "(B, Nk)")
    if key_modality.shape[0] != batch or key_modality.shape[1] != columns:
        _mismatch(op, "key_modality", "the shape (B, Nk)", (batch, columns), tuple(key_modality.shape))
    if modality_bias is not None:
        _broadcastable(op, "modality_bias", modality_bias, (batch, heads, rows, num_modalities), "(B, Hq, Nq, M)")
    if sink is not None:
        _broadcastable(op, "sink", sink, (batch, heads, rows), "(B, Hq, Nq)")


def varlen(
    query,
    key,
    value,
    key_modality,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    modality_bias,
    sink,
    num_modalities,
    is_causal,
    scale,
) -> None:
    """Raise unless ``modular_attention_varlen`` can run these arguments (after the autocast conversion)."""
    op = "modular_attention_varlen"
    _attention_options(op, num_modalities, is_causal, scale)
    _tensors(op, query, key, value, key_modality, modality_bias, sink)
    _views(op, query, 3, num_modalities, "(Tq, Hq, D)")
    _rank(op, "key", key, 3, "(Tk, Hkv, D)")
    _rank(op, "value", value, 3, "(Tk, Hkv, D)")
    tokens, heads, head_size = query.shape[-3:]
    key_tokens, kv_heads = key.shape[0], key.shape[1]
    _kv_shapes(op, heads, head_size, kv_heads, key, value)
    _rank(op, "key_modality", key_modality, 1, "(Tk,)")
    if key_modality.shape[0] != key_tokens:
        _mismatch(op, "key_modality", "the shape (Tk,)", (key_tokens,), tuple(key_modality.shape))
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _tensor(op, name, offsets)
        _dtype(op, name, offsets, OFFSETS)
        _device(op, name, offsets, query)
        _rank(op, name, offsets, 1, "(number of sequences + 1,)")
        if offsets.shape[0] < 1:
            _mismatch(op, name, "at least one offset, 0", "1 or more", 0)
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        expected = "as many offsets as cu_seqlens_q"
        _mismatch(op, "cu_seqlens_k", expected, cu_seqlens_q.shape[0], cu_seqlens_k.shape[0])
    _count(op, "max_seqlen_q", max_seqlen_q)
    _count(op, "max_seqlen_k", max_seqlen_k)
    if modality_bias is not None:
        _broadcastable(op, "modality_bias", modality_bias, (tokens, heads, num_modalities), "(Tq, Hq, M)")
    if sink is not None:
        _broadcastable(op, "sink", sink, (tokens, heads), "(Tq, Hq)")


def sink(num_rows, length, decay, base, start, device, dtype) -> None:
    """Raise unless ``pseudo_score_sink`` can run these arguments."""
    op = "pseudo_score_sink"
    _count(op, "num_rows", num_rows)
    _count(op, "start", start)
    if length is not None:
        _count(op, "length", length)
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be one of {_names(FLOATS)}, got {dtype}")
    for name, argument in (("decay", decay), ("base", base)):
        if not isinstance(argument, Tensor):
            if not _is_number(argument):
                raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(argument).__name__}")
            if name == "base" and not argument < math.inf:  # also NaN
                raise ValueError(f"{op}: base must be a number below infinity, got {argument}")
            continue
        _dtype(op, name, argument, FLOATS)
        if argument.dim() > 1:
            raise ValueError(f"{op}: {name} must be a scalar or have shape (H,), got shape {tuple(argument.shape)}")
        if device is not None and not _same_device(argument.device, torch.device(device)):
            raise ValueError(f"{op}: {name} must be on the device asked for ({device}), got {argument.device}")
    if isinstance(decay, Tensor) and isinstance(base, Tensor):
        _device(op, "base", base, decay, "decay")
        if decay.dim() == base.dim() == 1 and decay.shape[0] != base.shape[0] and 1 not in (*decay.shape, *base.shape):
            _mismatch(op, "base", "as many heads as decay", decay.shape[0], base.shape[0])
    if not isinstance(decay, Tensor):
        if not decay >= 0:  # also NaN
            raise ValueError(f"{op}: decay must be at least 0, got {decay}")
        if length is None and decay == 0:
            raise ValueError(
                f"{op}: decay must be above 0 when length is None, or the sum of pseudo scores is infinite; got {decay}"
            )


KEY_NORMS = ("l2", None)
NORMALIZERS = ("trace", "frobenius", "row", None)
MAX_RANK = 128


def gram(
    op, key, modality, num_modalities, include, key_norm, normalize, eps, key_name="key", modality_name="modality"
) -> None:
    """Raise unless ``modality_gram`` can run these arguments (after the autocast conversion)."""
    _modalities(op, num_modalities)
    _choice(op, "key_norm", key_norm, KEY_NORMS)
    _choice(op, "normalize", normalize, NORMALIZERS)
    if not _is_number(eps):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    if not _is_finite(eps):
        raise ValueError(f"{op}: eps must be finite, got {eps}")
    _tensor(op, key_name, key)
    _dtype(op, key_name, key, FLOATS)
    _rank(op, key_name, key, 4, "(B, Hkv, N, D)")
    _head_size(op, key_name, key.shape[-1])
    batch, _, tokens, _ = key.shape
    _token_ids(op, modality_name, modality, key, key_name, "(B, N)")
    if include is not None:
        _tensor(op, "include", include)
        _dtype(op, "include", include, (torch.bool,))
        _device(op, "include", include, key, "key")
        _shape(op, "include", include, (batch, tokens), "(B, N)")


def projected(op, query, gram) -> None:
    """Raise unless ``project_queries`` can run these arguments."""
    for name, tensor in (("query", query), ("gram", gram)):
        _tensor(op, name, tensor)
        _dtype(op, name, tensor, FLOATS)
    _device(op, "gram", gram, query)
    _rank(op, "query", query, 4, "(B, Hq, Nq, D)")
    _rank(op, "gram", gram, 5, "(B, Hkv, M, D, D)")
    _multiple_of(op, query.shape[1], gram.shape[1], "gram")
    expected = (query.shape[0], *gram.shape[1:3], query.shape[3], query.shape[3])
    if gram.shape != expected:
        _mismatch(op, "gram", "the batch and head size of query, (B, Hkv, M, D, D)", expected, tuple(gram.shape))


def causal(
    op,
    query,
    key,
    query_modality,
    key_modality,
    num_modalities,
    key_norm,
    normalize,
    eps,
    state,
    key_name="key",
    modality_name="key_modality",
) -> None:
    """Raise unless ``causal_gram_projection`` can run these arguments (after the autocast conversion)."""
    _tensor(op, "query", query)
    _dtype(op, "query", query, FLOATS)
    gram(op, key, key_modality, num_modalities, None, key_norm, normalize, eps, key_name, modality_name)
    if normalize == "row":
        raise ValueError(
            f"{op}: normalize='row' has no causal form, one number for each row and modality; expected 'trace', "
            "'frobenius' or None"
        )
    if key.dtype != query.dtype:
        raise TypeError(f"{op}: {key_name} must have the dtype of query ({query.dtype}), got {key.dtype}")
    _device(op, key_name, key, query)
    _rank(op, "query", query, 4, "(B, Hq, Nq, D)")
    batch, heads, rows, head_size = query.shape
    kv_heads, columns = key.shape[1:3]
    if key.shape[0] != batch:
        _mismatch(op, key_name, "the batch size of query", batch, key.shape[0])
    if key.shape[-1] != head_size:
        _mismatch(op, key_name, "the head size of query", head_size, key.shape[-1])
    _multiple_of(op, heads, kv_heads, key_name)
    if rows > columns:
        raise ValueError(
            f"{op}: query must have at most as many tokens as {key_name}, of which it is the last, got {rows} and "
            f"{columns}"
        )
    _token_ids(op, "query_modality", query_modality, query, "query", "(B, Nq)")
    if state is None:
        return
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"{op}: state must be a pair (gram, trace) of tensors, got {type(state).__name__}")
    shape = (batch, kv_heads, num_modalities)
    for name, tensor, expected in (
        ("state[0] (gram)", state[0], (*shape, head_size, head_size)),
        ("state[1] (trace)", state[1], shape),
    ):
        _tensor(op, name, tensor)
        _dtype(op, name, tensor, (accumulation_dtype(key.dtype),))
        _device(op, name, tensor, query)
        _shape(op, name, tensor, expected, "(B, Hkv, M, ...)")


def fuser(op, query, num_modalities, a1, b1, a2, b2) -> None:
    """Raise unless these are low-rank weights for the views of ``query``."""
    _tensor(op, "a1", a1)
    _rank(op, "a1", a1, 3, "(M, D, rank)")
    rank, head_size = a1.shape[-1], query.shape[-1]
    if rank < 1:
        _mismatch(op, "a1", "a rank of at least 1", "(M, D, rank)", tuple(a1.shape))
    if rank > MAX_RANK:
        raise NotImplementedError(
            f"{op}: a1 has rank {rank}, but the kernels take ranks up to {MAX_RANK}; call moda_ext.reference.{op}, "
            "which takes any"
        )
    for name, weight, expected in (
        ("a1", a1, (num_modalities, head_size, rank)),
        ("b1", b1, (num_modalities, rank, head_size)),
        ("a2", a2, (num_modalities, head_size, rank)),
        ("b2", b2, (num_modalities, rank, head_size)),
    ):
        _tensor(op, name, weight)
        _dtype(op, name, weight, FLOATS)
        _device(op, name, weight, query)
        _shape(op, name, weight, expected, "(M, D, rank)" if name in ("a1", "a2") else "(M, rank, D)")


def duplex(op, key, new_key, new_modality, condition) -> None:
    """Raise unless what ``duplex_attention`` has beside its two halves fits them."""
    if (new_key is None) != (new_modality is None):
        given, missing = ("new_modality", "new_key") if new_key is None else ("new_key", "new_modality")
        raise ValueError(f"{op}: {given} belongs to {missing}, which is None")
    if new_key is not None:
        for name, tensor in (("key", key), ("new_key", new_key)):
            _tensor(op, name, tensor)
            _rank(op, name, tensor, 4, "(B, Hkv, N, D)")
        if new_key.shape[1] != key.shape[1]:
            _mismatch(op, "new_key", "the number of heads of key", key.shape[1], new_key.shape[1])
    if condition is not None:
        _tensor(op, "condition", condition)
        _dtype(op, "condition", condition, FLOATS)


def conditioned_bias(op, query, modality_bias, condition, num_modalities) -> None:
    """Raise unless the indicator of this query can be scaled by ``condition`` and added to ``modality_bias``."""
    for name, tensor in (("modality_bias", modality_bias), ("condition", condition)):
        if tensor is not None:
            _tensor(op, name, tensor)
            _device(op, name, tensor, query)
            _broadcastable(op, name, tensor, (*query.shape[:3], num_modalities), "(B, Hq, Nq, M)")


def _choice(op, name, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _shape(op, name, tensor, expected, layout) -> None:
    """Size by size: comparing whole shapes would make torch.export fix every one of them."""
    fits = tensor.dim() == len(expected)
    for size, wanted in zip(tensor.shape, expected, strict=False):
        fits = fits and size == wanted
    if not fits:
        _mismatch(op, name, f"the shape {layout}", expected, tuple(tensor.shape))


def _token_ids(op, name, modality, tokens, tokens_name, layout) -> None:
    _tensor(op, name, modality)
    _dtype(op, name, modality, INTEGERS)
    _device(op, name, modality, tokens, tokens_name)
    _shape(op, name, modality, (tokens.shape[0], tokens.shape[2]), layout)


def _modalities(op, num_modalities) -> None:
    if not _is_integer(num_modalities):
        raise TypeError(f"{op}: num_modalities must be an int, got {type(num_modalities).__name__}")
    if num_modalities < 1 or num_modalities > MAX_MODALITIES:
        raise ValueError(f"{op}: num_modalities must lie in 1 to {MAX_MODALITIES}, got {num_modalities}")


def _multiple_of(op, heads, kv_heads, name) -> None:
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"{op}: the heads of query must be a multiple of the heads of {name} (GQA, at least one), "
            f"got {heads} query heads and {kv_heads} {name} heads"
        )


def _head_size(op, name, head_size, padding="Pad with zeros") -> None:
    if head_size < HEAD_SIZE_STEP or head_size > MAX_HEAD_SIZE or head_size % HEAD_SIZE_STEP != 0:
        raise NotImplementedError(
            f"{op}: {name} has head size {head_size}, but the kernels take multiples of {HEAD_SIZE_STEP} from "
            f"{HEAD_SIZE_STEP} to {MAX_HEAD_SIZE}. {padding}, or call moda_ext.reference.{op}, which takes any size"
        )


def _attention_options(op, num_modalities, is_causal, scale) -> None:
    _modalities(op, num_modalities)
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal must be a bool, got {type(is_causal).__name__}")
    if scale is not None and not _is_number(scale):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if scale is not None and not _is_finite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def _tensors(op, query, key, value, key_modality, modality_bias, sink) -> None:
    """Types, dtypes and devices, all compared with query's."""
    _tensor(op, "query", query)
    dtype, device = query.dtype, query.device
    if dtype not in FLOATS:
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise NotImplementedError(
                f"{op}: query has dtype {dtype}, and there is no kernel for 8-bit floating point; convert query, key "
                f"and value to torch.bfloat16"
            )
        raise TypeError(f"{op}: query must have one of the dtypes {_names(FLOATS)}, got {dtype}")
    for name, tensor in (("key", key), ("value", value)):
        _tensor(op, name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must have the dtype of query ({dtype}), got {tensor.dtype}")
        if tensor.device != device:
            _device(op, name, tensor, query)
    _tensor(op, "key_modality", key_modality)
    _dtype(op, "key_modality", key_modality, INTEGERS)
    if key_modality.device != device:
        _device(op, "key_modality", key_modality, query)
    for name, tensor in (("modality_bias", modality_bias), ("sink", sink)):
        if tensor is None:
            continue
        _tensor(op, name, tensor)
        if tensor.dtype != dtype and tensor.dtype != accumulation_dtype(dtype):
            also = accumulation_dtype(dtype)
            raise TypeError(f"{op}: {name} must have the dtype of query ({dtype}) or {also}, got {tensor.dtype}")
        if tensor.device != device:
            _device(op, name, tensor, query)


def _views(op, query, rank, num_modalities, layout) -> None:
    """query is one view of the given rank, or num_modalities views stacked in front."""
    if query.dim() == rank + 1:
        if query.shape[0] != num_modalities:
            expected = f"num_modalities={num_modalities} views in front"
            _mismatch(op, "query", f"{expected}, (M, {layout[1:]}", num_modalities, query.shape[0])
    elif query.dim() != rank:
        raise ValueError(
            f"{op}: query must have shape {layout}, or (M, {layout[1:]} with one view per modality, "
            f"got {query.dim()} dimensions, {tuple(query.shape)}"
        )


def _kv_shapes(op, heads, head_size, kv_heads, key, value) -> None:
    if value.shape != key.shape:
        _mismatch(op, "value", "the shape of key", tuple(key.shape), tuple(value.shape))
    if key.shape[-1] != head_size:
        _mismatch(op, "key", "the head size of query", head_size, key.shape[-1])
    _multiple_of(op, heads, kv_heads, "key")
    padding = "Pad query, key and value with zeros, pass the scale of the true head size and cut the output"
    _head_size(op, "query", head_size, padding)


def _broadcastable(op, name, tensor, shape, layout) -> None:
    given = tensor.shape
    missing = len(shape) - len(given)
    fits = missing >= 0
    if fits:
        for size, target in zip(given, shape[missing:], strict=True):
            if size != target and size != 1:
                fits = False
                break
    if not fits:
        _mismatch(op, name, f"a shape that broadcasts to {layout}", tuple(shape), tuple(given))


def _tensor(op, name, argument) -> None:
    if not isinstance(argument, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(argument).__name__}")


def _dtype(op, name, tensor, allowed) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {name} must have one of the dtypes {_names(allowed)}, got {tensor.dtype}")


def _device(op, name, tensor, other, other_name="query") -> None:
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def _same_device(device, wanted) -> bool:
    return device.type == wanted.type and (wanted.index is None or wanted.index == device.index)


def _rank(op, name, tensor, rank, layout) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {name} must have shape {layout}, got {tensor.dim()} dimensions, {tuple(tensor.shape)}")


def _count(op, name, value) -> None:
    if not _is_integer(value):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {value}")


def _mismatch(op, name, what, expected, got) -> None:
    raise ValueError(f"{op}: {name} must have {what}: expected {expected}, got {got}")


def _is_integer(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _is_finite(value) -> bool:
    """Of a number. A symbolic one is not asked: torch.compile would make a guard of the answer."""
    return isinstance(value, torch.SymInt | torch.SymFloat) or math.isfinite(value)


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
