"""Modular attention: softmax attention that knows the modality of every key.

Each function checks its arguments, brings them to the form the operators take (broadcast, accumulation dtype, int32
ids) and calls the native operator, or :mod:`moda_ext.reference` when the native library is not built. The layer made of
them, :class:`ModularDuplexAttention`, is in ``layer.py``.
"""

import torch
from torch import Tensor

from moda_ext import reference
from moda_ext._ops import autocast, autograd, checks
from moda_ext.alignment import _last_contiguous, _row_scale, _view_operands, duplex_query_views

__all__ = [
    "AttentionState",
    "ModularDuplexAttention",
    "duplex_attention",
    "modular_attention",
    "modular_attention_varlen",
    "pseudo_score_sink",
]


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
):
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
    query, key, value, modality_bias, sink = autocast.cast_inputs(query, key, value, modality_bias, sink)
    checks.dense(query, key, value, key_modality, modality_bias, sink, num_modalities, is_causal, scale)
    if not checks.runs_natively("modular_attention", query.device, dtype=query.dtype):
        return reference.modular_attention(
            query,
            key,
            value,
            key_modality,
            num_modalities=num_modalities,
            modality_bias=modality_bias,
            sink=sink,
            is_causal=is_causal,
            scale=scale,
            return_lse=return_lse,
            return_mass=return_mass,
        )
    rows = query.shape[-4:-1]
    out, lse, mass, _ = autograd.modular_attention(
        _last_contiguous(query),
        _last_contiguous(key),
        _last_contiguous(value),
        key_modality.to(torch.int32),
        _expand(modality_bias, (*rows, num_modalities), query.dtype),
        _expand(sink, rows, query.dtype),
        num_modalities,
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return reference.pack_results(out, lse, mass, return_lse, return_mass)


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
):
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
    query, key, value, modality_bias, sink = autocast.cast_inputs(query, key, value, modality_bias, sink)
    checks.varlen(
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
    if not checks.runs_natively("modular_attention_varlen", query.device, dtype=query.dtype):
        return reference.modular_attention_varlen(
            query,
            key,
            value,
            key_modality,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            num_modalities=num_modalities,
            modality_bias=modality_bias,
            sink=sink,
            is_causal=is_causal,
            scale=scale,
            return_lse=return_lse,
            return_mass=return_mass,
        )
    rows = query.shape[-3:-1]
    out, lse, mass, _ = autograd.modular_attention_varlen(
        _last_contiguous(query),
        _last_contiguous(key),
        _last_contiguous(value),
        key_modality.to(torch.int32),
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        _expand(modality_bias, (*rows, num_modalities), query.dtype),
        _expand(sink, rows, query.dtype),
        max_seqlen_q,
        max_seqlen_k,
        num_modalities,
        is_causal,
        query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return reference.pack_results(out, lse, mass, return_lse, return_mass)


def duplex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_modality: Tensor,
    key_modality: Tensor,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    *,
    new_key: Tensor | None = None,
    new_modality: Tensor | None = None,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    state: tuple[Tensor, Tensor] | None = None,
    modality_bias: Tensor | None = None,
    condition: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
):
    r"""Causal duplex attention: :func:`moda_ext.alignment.duplex_query_views`, then :func:`modular_attention`.

    .. math::
        q^{(1..M)}, e = \text{duplex\_query\_views}(q, k; A, B), \qquad
        \text{out} = \text{modular\_attention}(q^{(1..M)}, k, v;\; b + \lambda \odot e,\; c)

    with the bias b, the sink c, and a condition :math:`\lambda` on the indicator e. Number for number what the two
    calls give. On the CPU, where no gradient is asked for, one operator does both: the views, M times the query, then
    never exist as a whole. Source: MODA (arXiv 2507.04635), Eq. 5-10; MATH.md sections 1 and 2.

    Args:
        query: (B, Hq, Nq, D), as in :func:`modular_attention`, and so are key, value, key_modality, num_modalities,
            modality_bias, sink, scale, return_lse and return_mass. Always causal.
        query_modality: (B, Nq), integer, -1 for padding.
        a1: (M, D, rank), like b1, a2 and b2 as in ``duplex_query_views``, and so are key_norm, normalize, eps and
            state.
        new_key: (B, Hkv, Nnew, D), the keys that ``state`` does not hold, Nq <= Nnew; by default ``key``.
        new_modality: (B, Nnew), their modalities; by default ``key_modality``.
        condition: broadcastable to (B, Hq, Nq, M), in the dtype of ``modality_bias``: the factor of the indicator; None
            is 0.

    Returns:
        As :func:`modular_attention`. Differentiable as the two functions are.

    Raises:
        ValueError, TypeError, NotImplementedError: as the two functions.

    Example:
        >>> query = torch.randn(1, 8, 6, 64)
        >>> key, value = torch.randn(1, 2, 6, 64), torch.randn(1, 2, 6, 64)
        >>> modality = torch.tensor([[0, 1, 1, 1, 0, 0]])
        >>> a, b = torch.randn(2, 64, 16), torch.randn(2, 16, 64)
        >>> duplex_attention(query, key, value, modality, modality, a, b, a, b).shape
        torch.Size([1, 8, 6, 64])
    """
    weights = (a1, b1, a2, b2)
    checks.duplex("duplex_attention", key, new_key, new_modality, condition)
    new_names = ("key", "key_modality") if new_key is None else ("new_key", "new_modality")
    if new_key is None:
        new_key, new_modality = key, key_modality
    alignment = {"key_norm": key_norm, "normalize": normalize, "eps": eps, "state": state}
    results = {"return_lse": return_lse, "return_mass": return_mass}
    tensors = (
        query,
        key,
        value,
        new_key,
        *weights,
        *(state if isinstance(state, (tuple, list)) else ()),
        modality_bias,
        condition,
        sink,
    )
    op, fused = "duplex_attention", autograd.runs_fused(*tensors)
    query, key, value, modality_bias, sink = autocast.cast_inputs(query, key, value, modality_bias, sink)
    (new_key,) = autocast.cast_tokens(new_key)
    checks.dense(query, key, value, key_modality, modality_bias, sink, num_modalities, True, scale, op)
    modalities = query_modality, new_modality, num_modalities
    checks.causal(op, query, new_key, *modalities, key_norm, normalize, eps, state, *new_names)
    checks.fuser(op, query, num_modalities, *weights)
    checks.conditioned_bias(op, query, modality_bias, condition, num_modalities)
    if not fused:
        tokens = (query, new_key, query_modality, new_modality)
        if condition is None:
            views = duplex_query_views(*tokens, *weights, num_modalities, **alignment)
        else:
            views, indicator = duplex_query_views(*tokens, *weights, num_modalities, **alignment, return_indicator=True)
            conditioned = condition.to(indicator.dtype) * indicator
            modality_bias = conditioned if modality_bias is None else modality_bias + conditioned
        attention = {"modality_bias": modality_bias, "sink": sink, "is_causal": True, "scale": scale}
        return modular_attention(views, key, value, key_modality, num_modalities=num_modalities, **attention, **results)

    rows = query.shape[:-1]
    row_scale, _ = _row_scale(query, new_key, query_modality, new_modality, num_modalities, **alignment)
    out, lse, mass = autograd.duplex_attention(
        _last_contiguous(query),
        _last_contiguous(key),
        _last_contiguous(value),
        key_modality.to(torch.int32),
        *_view_operands(new_key, new_modality, row_scale, weights, state),
        _expand(modality_bias, (*rows, num_modalities), query.dtype),
        _expand(condition, (*rows, num_modalities), query.dtype),
        _expand(sink, rows, query.dtype),
        num_modalities,
        key_norm == "l2",
        float(eps),
        query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return reference.pack_results(out, lse, mass, return_lse, return_mass)


def pseudo_score_sink(
    num_rows: int,
    length: int | None,
    decay: float | Tensor,
    *,
    base: float | Tensor = 0.0,
    start: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""The pseudo scores of a causal row, summed: the ``sink`` that makes :func:`modular_attention` apply MODA's mask.

    Row i (1-based) of a sequence of maximal length n has n - i pseudo scores, which decay away from the diagonal:

    .. math::
        c_i = \log \sum_{t=1}^{n-i} e^{\text{base} - (t-1)\,\text{decay}}
            = \text{base} + \log(1 - e^{-\text{decay}\,(n-i)}) - \log(1 - e^{-\text{decay}})

    with the limit :math:`\text{base} + \log(n - i)` at decay 0, and -inf (no pseudo score left) for :math:`i \ge n`. A
    row's sink depends on its absolute position only, so decoding token by token agrees with training. ``base=-inf``
    switches pseudo scores off. Source: MODA, Eq. 9-10; StableMask, ICML 2024 (arXiv 2402.04779).

    Args:
        num_rows: number of rows.
        length: n, or None for an infinite one, where the sink is the same for every row and decay must be above 0.
        decay: decay per position, at least 0; a number or a floating-point tensor of shape (H,) or ().
        base: the first pseudo score; a number or a floating-point tensor of shape (H,) or ().
        start: 0-based absolute position of the first row: row r of the result is i = start + r + 1.
        device: device of the result, by default that of ``decay`` or ``base``, else the default device.
        dtype: dtype of the result. It is computed in float64 if ``dtype`` is float64, else in float32.

    Returns:
        (H, num_rows) if ``decay`` or ``base`` has shape (H,), else (num_rows,). Differentiable in ``decay`` and
        ``base``.

    Raises:
        ValueError: a negative number of rows, length, start or decay; decay 0 with an infinite length (for tensors: on
            the CPU); shapes or devices that do not fit.
        TypeError: an argument of another type or dtype.
        NotImplementedError: no kernel for this device.

    Example:
        >>> sink = pseudo_score_sink(5, 6, torch.tensor([0.5, 1.0]))  # two heads, five rows, at most six tokens
        >>> sink.shape, sink[:, -1]  # the last row has one pseudo score left, exp(0)
        (torch.Size([2, 5]), tensor([0., 0.]))
    """
    checks.sink(num_rows, length, decay, base, start, device, dtype)
    work = checks.accumulation_dtype(dtype)
    if device is None and isinstance(base, Tensor):
        device = base.device
    if not isinstance(decay, Tensor):
        decay = torch.full((), decay, dtype=work, device=device)
    if not isinstance(base, Tensor):
        base = torch.full((), base, dtype=work, device=decay.device)
    # On CUDA, too, the closed form is a handful of elementwise PyTorch operators.
    if decay.device.type == "cuda" or not checks.runs_natively("pseudo_score_sink", decay.device):
        return reference.pseudo_score_sink(num_rows, length, decay, base=base, start=start, dtype=dtype)
    per_head = torch.broadcast_shapes(decay.shape, base.shape)
    shape = per_head or (1,)
    sink = autograd.pseudo_score_sink(
        decay.to(work).expand(shape), base.to(work).expand(shape), num_rows, length, start
    ).to(dtype)
    return sink if per_head else sink[0]


def _expand(tensor: Tensor | None, shape, dtype: torch.dtype) -> Tensor | None:
    """Broadcast without copying, in the accumulation dtype of ``dtype``: autograd sums the gradient back."""
    return None if tensor is None else tensor.to(checks.accumulation_dtype(dtype)).expand(shape)


from moda_ext.layer import AttentionState, ModularDuplexAttention  # noqa: E402  it is made of the functions above
