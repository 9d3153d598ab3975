"""Modular attention: softmax attention that knows the modality of every key, and the layer made of it."""

from moda_ext.functional.attention import modular_attention, modular_attention_varlen
from moda_ext.functional.duplex import duplex_attention
from moda_ext.functional.paged import paged_cache_update, paged_duplex_attention, paged_modular_attention
from moda_ext.functional.sink import pseudo_score_sink
from moda_ext.nn.attention import ModularDuplexAttention
from moda_ext.nn.states import AttentionState

__all__ = [
    "AttentionState",
    "ModularDuplexAttention",
    "duplex_attention",
    "modular_attention",
    "modular_attention_varlen",
    "paged_cache_update",
    "paged_duplex_attention",
    "paged_modular_attention",
    "pseudo_score_sink",
]
