"""The native operators: what each declares beside its schema (csrc/ops/schemas.cpp), see :class:`Operator`."""

from types import SimpleNamespace

import torch
from torch import Tensor

from moda_ext._ops.limits import accumulation_dtype
from moda_ext._ops.operator import Operator, empty_in_layout_of


def _attention(given: SimpleNamespace) -> tuple[Tensor, ...]:
    dense = given.query.shape[-4:]
    return (empty_in_layout_of(given.query, dense), *_statistics(given.query, dense[:3], given.num_modalities))


def _attention_varlen(given: SimpleNamespace) -> tuple[Tensor, ...]:
    packed = given.query.shape[-3:]
    return (given.query.new_empty(packed), *_statistics(given.query, packed[:2], given.num_modalities))


def _statistics(query: Tensor, rows: torch.Size, num_modalities: int) -> tuple[Tensor, Tensor, Tensor]:
    """lse, mass and lse_residual"""
    dtype = accumulation_dtype(query.dtype)
    mass = query.new_empty((*rows, num_modalities), dtype=dtype)
    return query.new_empty(rows, dtype=dtype), mass, query.new_empty(rows, dtype=dtype)


def _gram(given: SimpleNamespace) -> Tensor:
    batch, heads, _, size = given.key.shape
    shape = batch, heads, given.num_modalities, size, size
    return given.key.new_empty(shape, dtype=accumulation_dtype(given.key.dtype))


def _projection(given: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return empty_in_layout_of(given.query, (given.num_modalities, *given.query.shape)), _gram(given)


def _views(given: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    empty = given.row_scale.new_empty(0)
    return (
        empty_in_layout_of(given.query, (given.num_modalities, *given.query.shape)),
        given.row_scale.new_empty((*given.query.shape[:3], given.num_modalities)) if given.with_indicator else empty,
        _gram(given) if given.with_gram else torch.empty_like(empty),
    )


modular_attention = Operator(
    "modular_attention",
    _attention,
    tokens=("query", "key", "value"),
    sums=("modality_bias", "sink"),
    batch={
        "query": -4,  # from the end: a query with views has one dimension more in front
        "key": -4,
        "value": -4,
        "key_modality": -2,
        "modality_bias": -4,
        "sink": -3,
        "out": -4,
        "lse": -3,
        "mass": -4,
        "lse_residual": -3,
    },
    gradient_options={"whole_rows": True},
    flex=True,
)
modular_attention_varlen = Operator(
    "modular_attention_varlen",
    _attention_varlen,
    tokens=("query", "key", "value"),
    sums=("modality_bias", "sink"),
    packed=True,
    flex=True,
)
modality_gram = Operator(
    "modality_gram",
    _gram,
    tokens=("key",),
    batch={"key": -4, "modality": -2, "gram": -5},
    contiguous=("gram",),
    composite=True,
)
# No batch: the gradients of the weights are sums over it.
causal_gram_projection = Operator(
    "causal_gram_projection", _projection, tokens=("query", "key"), contiguous=("gram",), composite=True
)
duplex_query_views = Operator(
    "duplex_query_views", _views, tokens=("query", "key"), contiguous=("gram",), composite=True
)
duplex_attention = Operator(
    "duplex_attention",
    lambda given: _attention(given)[:3],
    tokens=("query", "key", "value", "new_key"),
    sums=("modality_bias", "condition", "sink"),
    instead="moda_ext.attention.duplex_attention has, by way of its two halves",
)
duplex_aligned_keys = Operator(
    "duplex_aligned_keys",
    lambda given: empty_in_layout_of(given.key, given.key.shape),
    tokens=("key",),
    instead="moda_ext.alignment.DuplexAligner.align_keys has, by way of other operators",
)

paged_modular_attention = Operator(
    "paged_modular_attention",
    lambda given: _attention_varlen(given)[:3],
    instead="moda_ext.attention.paged_modular_attention has, by way of modular_attention",
)
paged_duplex_attention = Operator(
    "paged_duplex_attention",
    lambda given: _attention_varlen(given)[:3],
    instead="moda_ext.attention.paged_duplex_attention has, by way of duplex_attention",
)
paged_cache_update = Operator(
    "paged_cache_update",
    lambda given: None,
    instead="moda_ext.attention.paged_cache_update has, by way of PyTorch's indexing",
)
paged_attention_step = Operator(
    "paged_attention_step",
    lambda given: _statistics(given.query, given.query.shape[:2], given.num_modalities)[1],
    instead="moda_ext.functional.paged.step has, by way of the other operators on pages",
)

DECLARED = {name: value for name, value in list(globals().items()) if isinstance(value, Operator)}
