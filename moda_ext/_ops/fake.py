"""Fake kernels: shapes, dtypes and strides of every operator's results without computing them (torch.compile, export).

The strides are those of the native kernels. A dense result in the layout of an input X is *tokens-major* (memory order
(..., N, H, D), seen as (..., H, N, D)) when X steps further from row to row than from head to head, else contiguous.
"""

import torch
from torch import Tensor

from .checks import accumulation_dtype


def empty_in_layout_of(like: Tensor, shape) -> Tensor:
    """Uninitialised (..., H, N, D) tensor with the dtype of ``like``, tokens-major exactly when ``like`` is."""
    if like.stride(-2) > like.stride(-3):
        *outer, heads, rows, size = shape
        return like.new_empty((*outer, rows, heads, size)).transpose(-3, -2)
    return like.new_empty(shape)


def modular_attention(
    query, key, value, key_modality, modality_bias, sink, num_modalities, is_causal, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = query.shape[-4:]
    dtype = accumulation_dtype(query.dtype)
    return (
        empty_in_layout_of(query, shape),
        query.new_empty(shape[:3], dtype=dtype),
        query.new_empty((*shape[:3], num_modalities), dtype=dtype),
        query.new_empty(shape[:3], dtype=dtype),
    )


def modular_attention_backward(
    grad_out,
    grad_lse,
    grad_mass,
    query,
    key,
    value,
    key_modality,
    modality_bias,
    sink,
    out,
    lse,
    mass,
    lse_residual,
    num_modalities,
    is_causal,
    scale,
    need_query,
    need_key,
    need_value,
    need_bias,
    need_sink,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_in_layout_of(query, query.shape) if need_query else query.new_empty(0),
        empty_in_layout_of(key, key.shape) if need_key else key.new_empty(0),
        empty_in_layout_of(value, value.shape) if need_value else value.new_empty(0),
        mass.new_empty(mass.shape if need_bias else 0),
        lse.new_empty(lse.shape if need_sink else 0),
    )


def modular_attention_varlen(
    query,
    key,
    value,
    key_modality,
    cu_seqlens_q,
    cu_seqlens_k,
    modality_bias,
    sink,
    max_seqlen_q,
    max_seqlen_k,
    num_modalities,
    is_causal,
    scale,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = query.shape[-3:]
    dtype = accumulation_dtype(query.dtype)
    return (
        query.new_empty(shape),
        query.new_empty(shape[:2], dtype=dtype),
        query.new_empty((*shape[:2], num_modalities), dtype=dtype),
        query.new_empty(shape[:2], dtype=dtype),
    )


def modular_attention_varlen_backward(
    grad_out,
    grad_lse,
    grad_mass,
    query,
    key,
    value,
    key_modality,
    cu_seqlens_q,
    cu_seqlens_k,
    modality_bias,
    sink,
    out,
    lse,
    mass,
    lse_residual,
    max_seqlen_q,
    max_seqlen_k,
    num_modalities,
    is_causal,
    scale,
    need_query,
    need_key,
    need_value,
    need_bias,
    need_sink,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else 0),
        key.new_empty(key.shape if need_key else 0),
        value.new_empty(value.shape if need_value else 0),
        mass.new_empty(mass.shape if need_bias else 0),
        lse.new_empty(lse.shape if need_sink else 0),
    )


def pseudo_score_sink(decay, base, num_rows, length, start) -> Tensor:
    return decay.new_empty((decay.shape[0], num_rows))


def pseudo_score_sink_backward(grad, decay, base, num_rows, length, start) -> tuple[Tensor, Tensor]:
    return decay.new_empty(decay.shape), base.new_empty(base.shape)


def _gram(key, num_modalities) -> Tensor:
    batch, heads, _, size = key.shape
    return key.new_empty((batch, heads, num_modalities, size, size), dtype=accumulation_dtype(key.dtype))


def modality_gram(key, modality, num_modalities, unit_keys, eps) -> Tensor:
    return _gram(key, num_modalities)


def modality_gram_backward(grad_gram, key, modality, num_modalities, unit_keys, eps) -> Tensor:
    return empty_in_layout_of(key, key.shape)


def causal_gram_projection(
    query, key, key_modality, row_scale, initial, num_modalities, unit_keys, eps
) -> tuple[Tensor, Tensor]:
    return empty_in_layout_of(query, (num_modalities, *query.shape)), _gram(key, num_modalities)


def _causal_gradients(query, key, row_scale, initial, weights=()) -> tuple[Tensor, ...]:
    return (
        empty_in_layout_of(query, query.shape),
        empty_in_layout_of(key, key.shape),
        *(row_scale.new_empty(tensor.shape) for tensor in (row_scale, *weights)),
        row_scale.new_empty(0 if initial is None else initial.shape),
    )


def causal_gram_projection_backward(
    grad_projection, grad_gram, query, key, key_modality, row_scale, initial, num_modalities, unit_keys, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _causal_gradients(query, key, row_scale, initial)


def duplex_query_views(
    query,
    key,
    key_modality,
    row_scale,
    a1,
    b1,
    a2,
    b2,
    initial,
    num_modalities,
    unit_keys,
    eps,
    with_indicator,
    with_gram,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_in_layout_of(query, (num_modalities, *query.shape)),
        row_scale.new_empty((*query.shape[:3], num_modalities) if with_indicator else 0),
        _gram(key, num_modalities) if with_gram else row_scale.new_empty(0),
    )


def duplex_query_views_backward(
    grad_views,
    grad_indicator,
    grad_gram,
    query,
    key,
    key_modality,
    row_scale,
    a1,
    b1,
    a2,
    b2,
    initial,
    indicator,
    num_modalities,
    unit_keys,
    eps,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _causal_gradients(query, key, row_scale, initial, (a1, b1, a2, b2))


def duplex_attention(
    query,
    key,
    value,
    key_modality,
    new_key,
    new_modality,
    row_scale,
    a1,
    b1,
    a2,
    b2,
    initial,
    modality_bias,
    condition,
    sink,
    num_modalities,
    unit_keys,
    eps,
    scale,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, mass, _ = modular_attention(
        query, key, value, key_modality, modality_bias, sink, num_modalities, is_causal=True, scale=scale
    )
    return out, lse, mass


def duplex_aligned_keys(
    key, modality, include, a1, b1, a2, b2, num_modalities, unit_keys, eps, normalization
) -> Tensor:
    return empty_in_layout_of(key, key.shape)


def register() -> None:
    for kernel in (
        modular_attention,
        modular_attention_backward,
        modular_attention_varlen,
        modular_attention_varlen_backward,
        pseudo_score_sink,
        pseudo_score_sink_backward,
        modality_gram,
        modality_gram_backward,
        causal_gram_projection,
        causal_gram_projection_backward,
        duplex_query_views,
        duplex_query_views_backward,
        duplex_attention,
        duplex_aligned_keys,
    ):
        torch.library.register_fake(f"moda_ext::{kernel.__name__}", kernel)
