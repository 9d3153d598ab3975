"""Modular attention, dense and packed: softmax attention that knows the modality of every key.

Each function checks its arguments, brings them to the form of the operators (broadcast, dtype of sums, int32 ids) and
calls the operator, or :mod:`moda_ext.reference` where there are no kernels.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moda_ext import reference
from moda_ext._ops import autocast, backend, operators
from moda_ext._ops.limits import FLOATS, INTEGERS, OFFSETS, accumulation_dtype
from moda_ext.functional import checks, flex

# A tensor, or the tuple that flags ask for: which of them a type checker cannot see.
Results: TypeAlias = Tensor | Any


def modular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    r"""Attention with a bias per (row, key modality), a sink per row, and the attention mass of every modality.

    With :math:`a_j` the modality of key j, :math:`b` the modality bias and :math:`c` the sink,

    .. math::
        S_{ij} = \text{scale}\; q_i^{(a_j)} \cdot k_j + b_{i, a_j}, \qquad
        p_{ij} = \frac{e^{S_{ij}}}{\sum_{j'} e^{S_{ij'}} + e^{c_i}}, \qquad
        o_i = \sum_j p_{ij} v_j

    over the visible keys j: those with :math:`a_j \ge 0` and, if ``is_causal``, :math:`j \le i + N_k - N_q`. Without
    bias, sink and padding this is :func:`torch.nn.functional.scaled_dot_product_attention`. Source: MODA, ICML 2025
    (arXiv 2507.04635), Eq. 7-10; the pseudo scores of its mask enter as the sink, see :func:`pseudo_score_sink`.

    Args:
        query: (B, Hq, Nq, D), or (M, B, Hq, Nq, D): one view of the query per key modality, :math:`q^{(m)}`. float32,
            float64, bfloat16 or float16; D is a multiple of 8 from 8 to 256.
        key: (B, Hkv, Nk, D), dtype and device of ``query``. Hq is a multiple of Hkv: query head h reads key head
            h // (Hq / Hkv).
        value: like ``key``. Query, key and value may have any strides; only a last dimension that is not contiguous is
            copied.
        key_modality: (B, Nk), any integer dtype. The modality of each key in [0, M), or -1 for padding, which nobody
            sees.
        num_modalities: M, 1 to 16.
        modality_bias: broadcastable to (B, Hq, Nq, M), in the dtype of ``query`` or of ``lse``. -inf hides a modality
            from a row; a finite number never does by itself. However large, only differences within a row count: a
            number that all its biases and its sink have in common changes ``lse`` and nothing else.
        sink: broadcastable to (B, Hq, Nq), natural logarithm, dtype as ``modality_bias``. -inf is no sink.
        is_causal: causal mask, aligned at the bottom right: the last query sees all keys, also when Nq != Nk.
        scale: factor of the scores, by default D ** -0.5.
        return_lse: also return ``lse``.
        return_mass: also return ``mass``.

    Returns:
        ``out`` (B, Hq, Nq, D) in the dtype of ``query``, or the tuple ``(out[, lse][, mass])`` of what was asked for:

        - ``lse`` (B, Hq, Nq), :math:`\log(\sum_j e^{S_{ij}} + e^{c_i})`, float64 for float64 inputs, else float32;
        - ``mass`` (B, Hq, Nq, M), :math:`\sum_{j: a_j = m} p_{ij}`, dtype as ``lse``. It sums to 1 minus the sink's
          share.

        All are differentiable (once; :mod:`moda_ext.reference` has higher derivatives) in query, key, value,
        modality_bias and sink. A row that sees nothing has out 0, mass 0, lse equal to its sink or -inf, and gradients
        0. Empty batches, zero queries and zero keys are valid.

    Raises:
        ValueError: a shape, size or option does not fit, or (on the CPU) a modality id is outside [-1, M).
        TypeError: an argument is not a tensor, or has the wrong dtype.
        NotImplementedError: no kernel for this head size, dtype or device; the message says what would work.

    Under autocast, query, key and value are cast to the autocast dtype, as in ``scaled_dot_product_attention``.

    Example:
        >>> query = torch.randn(1, 8, 6, 64)
        >>> key, value = torch.randn(1, 2, 6, 64), torch.randn(1, 2, 6, 64)
        >>> key_modality = torch.tensor([[0, 1, 1, 1, 0, 0]])  # text, three image patches, text
        >>> prior = torch.tensor([0.0, 0.5])  # every row favours modality 1
        >>> out, mass = modular_attention(
        ...     query, key, value, key_modality, modality_bias=prior, is_causal=True, return_mass=True
        ... )
        >>> out.shape, mass.shape
        (torch.Size([1, 8, 6, 64]), torch.Size([1, 8, 6, 2]))
    """
    query, key, value = autocast.cast_tokens(query, key, value)
    modality_bias, sink = autocast.cast_sums(query, modality_bias, sink)
    check_attention(query, key, value, key_modality, modality_bias, sink, num_modalities, is_causal, scale)
    with autocast.suspended(query):
        return attend(
            query,
            key,
            value,
            key_modality,
            num_modalities,
            modality_bias=modality_bias,
            sink=sink,
            is_causal=is_causal,
            scale=scale,
            return_lse=return_lse,
            return_mass=return_mass,
        )


def modular_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    """:func:`modular_attention` over sequences of different lengths packed into one: no padding, no batch dimension.

    Sequence s has the queries ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` and the keys ``cu_seqlens_k[s]`` to
    ``cu_seqlens_k[s + 1]``; a query sees keys of its own sequence only, and ``is_causal`` is aligned at the bottom
    right of each sequence. The equation is that of :func:`modular_attention`, sequence by sequence.

    Args:
        query: (Tq, Hq, D), or (M, Tq, Hq, D): one view of the query per key modality. Dtypes and head sizes as in
            :func:`modular_attention`.
        key: (Tk, Hkv, D), dtype and device of ``query``; Hq is a multiple of Hkv.
        value: like ``key``.
        key_modality: (Tk,), any integer dtype, in [0, M), or -1 for a key that nobody sees.
        cu_seqlens_q: (S + 1,), int32 or int64 (converted to int32): offsets that rise from 0 to Tq.
        cu_seqlens_k: (S + 1,), the same for the keys, from 0 to Tk.
        max_seqlen_q: length of the longest query sequence, or an upper bound of it.
        max_seqlen_k: the same for the keys.
        num_modalities: M, 1 to 16.
        modality_bias: broadcastable to (Tq, Hq, M), in the dtype of ``query`` or of ``lse``. -inf hides; a finite
            number of any size counts relative to the row's others, as in :func:`modular_attention`.
        sink: broadcastable to (Tq, Hq), natural logarithm, dtype as ``modality_bias``.
        is_causal: causal mask within each sequence, aligned at its bottom right.
        scale: factor of the scores, by default D ** -0.5.
        return_lse: also return ``lse``.
        return_mass: also return ``mass``.

    Returns:
        ``out`` (Tq, Hq, D) in the dtype of ``query``, or the tuple ``(out[, lse][, mass])`` with ``lse`` (Tq, Hq) and
        ``mass`` (Tq, Hq, M) in float32, or float64 for float64 inputs. Differentiable as in :func:`modular_attention`.

    Raises:
        ValueError: a shape, size or option does not fit; on the CPU also an id outside [-1, M) and offsets that do not
            partition the tokens.
        TypeError: an argument is not a tensor, or has the wrong dtype.
        NotImplementedError: no kernel for this head size, dtype or device; the message says what would work.

    Example:
        >>> query, key, value = torch.randn(3, 7, 4, 32)  # 7 tokens, 4 heads: sequences of 3 and 4 tokens
        >>> cu_seqlens = torch.tensor([0, 3, 7])
        >>> key_modality = torch.tensor([0, 1, 1, 1, 1, 0, 0])
        >>> modular_attention_varlen(query, key, value, key_modality, cu_seqlens, cu_seqlens, 4, 4).shape
        torch.Size([7, 4, 32])
    """
    query, key, value = autocast.cast_tokens(query, key, value)
    modality_bias, sink = autocast.cast_sums(query, modality_bias, sink)
    check_varlen(
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
    )
    query, key, value = last_contiguous(query), last_contiguous(key), last_contiguous(value)
    chosen = _choose("modular_attention_varlen", query, key, value, modality_bias, sink)
    if chosen != backend.NATIVE:
        packed = query, key, value, key_modality, cu_seqlens_q, cu_seqlens_k
        terms: dict[str, Any] = {"modality_bias": modality_bias, "sink": sink}
        terms |= {"num_modalities": num_modalities, "is_causal": is_causal, "scale": scale}
        with autocast.suspended(query):
            if chosen == backend.FLEX:
                return pack_results(*flex.modular_attention_varlen(*packed, **terms), return_lse, return_mass)
            terms |= {"return_lse": return_lse, "return_mass": return_mass}
            return reference.modular_attention_varlen(*packed, max_seqlen_q, max_seqlen_k, **terms)
    rows = query.shape[-3:-1]
    out, lse, mass, _ = operators.modular_attention_varlen(
        query=query,
        key=key,
        value=value,
        key_modality=as_int32(key_modality),
        cu_seqlens_q=as_int32(cu_seqlens_q),
        cu_seqlens_k=as_int32(cu_seqlens_k),
        modality_bias=expand(modality_bias, (*rows, num_modalities), query.dtype),
        sink=expand(sink, rows, query.dtype),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        num_modalities=num_modalities,
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return pack_results(out, lse, mass, return_lse, return_mass)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    num_modalities: int,
    *,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    return_mass: bool,
) -> Results:
    """:func:`modular_attention` of arguments that are checked, and cast for autocast."""
    query, key, value = last_contiguous(query), last_contiguous(key), last_contiguous(value)
    chosen = _choose("modular_attention", query, key, value, modality_bias, sink)
    if chosen != backend.NATIVE:
        tokens = query, key, value, key_modality
        terms: dict[str, Any] = {"modality_bias": modality_bias, "sink": sink}
        terms |= {"num_modalities": num_modalities, "is_causal": is_causal, "scale": scale}
        if chosen == backend.FLEX:
            return pack_results(*flex.modular_attention(*tokens, **terms), return_lse, return_mass)
        return reference.modular_attention(*tokens, **terms, return_lse=return_lse, return_mass=return_mass)
    rows = query.shape[-4:-1]
    out, lse, mass, _ = operators.modular_attention(
        query=query,
        key=key,
        value=value,
        key_modality=as_int32(key_modality),
        modality_bias=expand(modality_bias, (*rows, num_modalities), query.dtype),
        sink=expand(sink, rows, query.dtype),
        num_modalities=num_modalities,
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return pack_results(out, lse, mass, return_lse, return_mass)


def _choose(op: str, query: Tensor, key: Tensor, *others: Tensor | None) -> str:
    chosen = backend.choose(op, query, key, *others)
    empty = chosen == backend.FLEX and (query.numel() == 0 or key.numel() == 0)  # FlexAttention takes none such
    return backend.REFERENCE if empty else chosen


def expand(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Broadcast without copying, in the accumulation dtype of ``dtype``: autograd sums the gradient back."""
    return None if tensor is None else tensor.to(accumulation_dtype(dtype)).expand(shape)


def as_int32(integers: Tensor) -> Tensor:
    """As the operators take them. What has no place there becomes the nearest that has, which they refuse as well."""
    if integers.dtype == torch.int64:
        integers = integers.clamp(-(2**31), 2**31 - 1)
    return integers.to(torch.int32)


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def pack_results(out: Tensor, lse: Tensor, mass: Tensor, return_lse: bool, return_mass: bool) -> Results:
    """out, or the tuple (out[, lse][, mass]) that was asked for."""
    if not (return_lse or return_mass):
        return out
    return (out, *((lse,) if return_lse else ()), *((mass,) if return_mass else ()))


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    num_modalities: int,
    is_causal: bool,
    scale: float | None,
    op: str = "modular_attention",
) -> None:
    """Raise unless ``modular_attention`` can run these arguments (after the autocast conversion)."""
    attention_options(op, num_modalities, is_causal, scale)
    _tensors(op, query, key, value, key_modality, modality_bias, sink)
    _views(op, query, 4, num_modalities, "(B, Hq, Nq, D)")
    checks.rank(op, "key", key, 4, "(B, Hkv, Nk, D)")
    checks.rank(op, "value", value, 4, "(B, Hkv, Nk, D)")
    batch, heads, rows, head_size = query.shape[-4:]
    kv_heads, columns = key.shape[1], key.shape[2]
    if key.shape[0] != batch:
        checks.mismatch(op, "key", "the batch size of query", batch, key.shape[0])
    _kv_shapes(op, heads, head_size, kv_heads, key, value)
    checks.rank(op, "key_modality", key_modality, 2, "(B, Nk)")
    if key_modality.shape[0] != batch or key_modality.shape[1] != columns:
        checks.mismatch(op, "key_modality", "the shape (B, Nk)", (batch, columns), tuple(key_modality.shape))
    if modality_bias is not None:
        checks.broadcastable(op, "modality_bias", modality_bias, (batch, heads, rows, num_modalities), "(B, Hq, Nq, M)")
    if sink is not None:
        checks.broadcastable(op, "sink", sink, (batch, heads, rows), "(B, Hq, Nq)")


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    num_modalities: int,
    is_causal: bool,
    scale: float | None,
) -> None:
    """Raise unless ``modular_attention_varlen`` can run these arguments (after the autocast conversion)."""
    op = "modular_attention_varlen"
    attention_options(op, num_modalities, is_causal, scale)
    _tensors(op, query, key, value, key_modality, modality_bias, sink)
    _views(op, query, 3, num_modalities, "(Tq, Hq, D)")
    checks.rank(op, "key", key, 3, "(Tk, Hkv, D)")
    checks.rank(op, "value", value, 3, "(Tk, Hkv, D)")
    tokens, heads, head_size = query.shape[-3:]
    key_tokens, kv_heads = key.shape[0], key.shape[1]
    _kv_shapes(op, heads, head_size, kv_heads, key, value)
    checks.rank(op, "key_modality", key_modality, 1, "(Tk,)")
    if key_modality.shape[0] != key_tokens:
        checks.mismatch(op, "key_modality", "the shape (Tk,)", (key_tokens,), tuple(key_modality.shape))
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.tensor(op, name, offsets)
        checks.dtype(op, name, offsets, OFFSETS)
        checks.device(op, name, offsets, query)
        checks.rank(op, name, offsets, 1, "(number of sequences + 1,)")
        if offsets.shape[0] < 1:
            checks.mismatch(op, name, "at least one offset, 0", "1 or more", 0)
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        expected = "as many offsets as cu_seqlens_q"
        checks.mismatch(op, "cu_seqlens_k", expected, cu_seqlens_q.shape[0], cu_seqlens_k.shape[0])
    checks.count(op, "max_seqlen_q", max_seqlen_q)
    checks.count(op, "max_seqlen_k", max_seqlen_k)
    if modality_bias is not None:
        checks.broadcastable(op, "modality_bias", modality_bias, (tokens, heads, num_modalities), "(Tq, Hq, M)")
    if sink is not None:
        checks.broadcastable(op, "sink", sink, (tokens, heads), "(Tq, Hq)")


def attention_options(op: str, num_modalities: int, is_causal: bool, scale: float | None) -> None:
    """Raise unless these options are numbers of their kind, in their range."""
    checks.num_modalities(op, num_modalities)
    if not isinstance(is_causal, bool):
        raise TypeError(f"{op}: is_causal must be a bool, got {type(is_causal).__name__}")
    if scale is not None and not checks.is_number(scale):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if scale is not None and not checks.is_finite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def _tensors(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    modality_bias: Tensor | None,
    sink: Tensor | None,
) -> None:
    """Types, dtypes and devices, all compared with query's."""
    checks.tensor(op, "query", query)
    dtype, device = query.dtype, query.device
    if dtype not in FLOATS:
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise NotImplementedError(
                f"{op}: query has dtype {dtype}, and there is no kernel for 8-bit floating point; convert query, key "
                f"and value to torch.bfloat16"
            )
        raise TypeError(f"{op}: query must have one of the dtypes {checks.names(FLOATS)}, got {dtype}")
    for name, tensor in (("key", key), ("value", value)):
        checks.tensor(op, name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must have the dtype of query ({dtype}), got {tensor.dtype}")
        if tensor.device != device:
            checks.device(op, name, tensor, query)
    checks.tensor(op, "key_modality", key_modality)
    checks.dtype(op, "key_modality", key_modality, INTEGERS)
    if key_modality.device != device:
        checks.device(op, "key_modality", key_modality, query)
    for name, term in (("modality_bias", modality_bias), ("sink", sink)):
        if term is None:
            continue
        checks.tensor(op, name, term)
        if term.dtype != dtype and term.dtype != accumulation_dtype(dtype):
            also = accumulation_dtype(dtype)
            raise TypeError(f"{op}: {name} must have the dtype of query ({dtype}) or {also}, got {term.dtype}")
        if term.device != device:
            checks.device(op, name, term, query)


def _views(op: str, query: Tensor, rank: int, num_modalities: int, layout: str) -> None:
    """query is one view of the given rank, or num_modalities views stacked in front."""
    if query.dim() == rank + 1:
        if query.shape[0] != num_modalities:
            expected = f"num_modalities={num_modalities} views in front"
            checks.mismatch(op, "query", f"{expected}, (M, {layout[1:]}", num_modalities, query.shape[0])
    elif query.dim() != rank:
        raise ValueError(
            f"{op}: query must have shape {layout}, or (M, {layout[1:]} with one view per modality, "
            f"got {query.dim()} dimensions, {tuple(query.shape)}"
        )


def _kv_shapes(op: str, heads: int, head_size: int, kv_heads: int, key: Tensor, value: Tensor) -> None:
    if value.shape != key.shape:
        checks.mismatch(op, "value", "the shape of key", tuple(key.shape), tuple(value.shape))
    if key.shape[-1] != head_size:
        checks.mismatch(op, "key", "the head size of query", head_size, key.shape[-1])
    checks.multiple_of(op, heads, kv_heads, "key")
    padding = "Pad query, key and value with zeros, pass the scale of the true head size and cut the output"
    checks.head_size(op, "query", head_size, padding)
