"""Plain-PyTorch operators: dense, differentiable by autograd, on any device and in any floating-point dtype.

They are the tests' oracle (run them in float64) and what the package runs where there are no kernels. Memory is
O(Nq * Nk). Everything follows the equations; the one liberty is that the sink is one more column of the scores, which
is what a sum of exponentials that only enlarges the denominator amounts to. Nothing here is shared with what it judges:
these files import nothing of the package but each other.
"""

from moda_ext.reference.alignment import (
    causal_gram_projection,
    duplex_query_views,
    modality_gram,
    normalize_gram,
    project_queries,
)
from moda_ext.reference.attention import (
    dense_attention,
    merged_attention,
    modular_attention,
    modular_attention_varlen,
)
from moda_ext.reference.sink import pseudo_score_sink, stable_mask_weights

__all__ = [
    "causal_gram_projection",
    "dense_attention",
    "duplex_query_views",
    "merged_attention",
    "modality_gram",
    "modular_attention",
    "modular_attention_varlen",
    "normalize_gram",
    "project_queries",
    "pseudo_score_sink",
    "stable_mask_weights",
]
