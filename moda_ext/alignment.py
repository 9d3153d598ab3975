"""Duplex attention alignment: Gram matrices of modalities, queries seen through them, and the module made of them."""

from moda_ext.functional.alignment import (
    causal_gram_projection,
    duplex_query_views,
    gram_indicator,
    modality_gram,
    project_queries,
)
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.states import GramState

__all__ = [
    "DuplexAligner",
    "GramState",
    "causal_gram_projection",
    "duplex_query_views",
    "gram_indicator",
    "modality_gram",
    "project_queries",
]
