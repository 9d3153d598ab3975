"""Attention on a cache in pages: the keys of every sequence gathered, then dense attention, sequence by sequence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moda_ext.reference.alignment import duplex_query_views
from moda_ext.reference.attention import modular_attention

__all__ = ["paged_cache_update", "paged_duplex_attention", "paged_modular_attention"]


def paged_cache_update(key: Tensor, value: Tensor, modality: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """:func:`moda_ext.attention.paged_cache_update`, token by token."""
    block, size = kv_cache.shape[2], key.shape[-1]
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cell = kv_cache[slot // block, :, slot % block]
            cell[:, :size], cell[:, size : 2 * size], cell[:, 2 * size] = key[i], value[i], modality[i].to(key.dtype)


def paged_modular_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass of :func:`moda_ext.attention.paged_modular_attention`. Reads the lengths on the host."""

    def attend(query: Tensor, key: Tensor, value: Tensor, modality: Tensor, rows: slice) -> Any:
        return modular_attention(
            query,
            key,
            value,
            modality,
            num_modalities=num_modalities,
            modality_bias=_heads_first(modality_bias, rows),
            sink=_heads_first(sink, rows),
            is_causal=True,
            scale=scale,
            return_lse=True,
            return_mass=True,
        )

    return _each_sequence(attend, query, kv_cache, block_table, seq_lens, query_start_loc, num_modalities)


def paged_duplex_attention(
    query: Tensor,
    query_modality: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    condition: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    **alignment: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass of :func:`moda_ext.attention.paged_duplex_attention`, whose key_norm, normalize and eps are
    ``alignment``. Reads the lengths on the host."""

    def attend(query: Tensor, key: Tensor, value: Tensor, modality: Tensor, rows: slice) -> Any:
        of_rows = query_modality[rows][None]
        tokens = query, key, of_rows, modality, a1, b1, a2, b2, num_modalities
        views, indicator = duplex_query_views(*tokens, **alignment, return_indicator=True)
        bias, factor = _heads_first(modality_bias, rows), _heads_first(condition, rows)
        if factor is not None:
            bias = factor * indicator if bias is None else bias + factor * indicator
        return modular_attention(
            views,
            key,
            value,
            modality,
            num_modalities=num_modalities,
            modality_bias=bias,
            sink=_heads_first(sink, rows),
            is_causal=True,
            scale=scale,
            return_lse=True,
            return_mass=True,
        )

    return _each_sequence(attend, query, kv_cache, block_table, seq_lens, query_start_loc, num_modalities)


def _each_sequence(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, slice], Any],
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    num_modalities: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attend`` for the rows and the gathered keys of one sequence after the other."""
    rows, heads, head_size = query.shape[-3:]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(rows, heads, head_size)
    lse = query.new_zeros(rows, heads, dtype=dtype)
    mass = query.new_zeros(rows, heads, num_modalities, dtype=dtype)
    block, starts = kv_cache.shape[2], query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        of_sequence = slice(starts[i], starts[i + 1])
        pages = kv_cache[block_table[i, : -(-length // block)].long()]  # (pages, Hkv, block, C)
        cells = pages.transpose(0, 1).flatten(1, 2)[None, :, :length]  # (1, Hkv, length, C)
        results = attend(
            query[..., of_sequence, :, :].transpose(-2, -3).unsqueeze(-4),
            cells[..., :head_size],
            cells[..., head_size : 2 * head_size],
            cells[:, 0, :, 2 * head_size].long(),
            of_sequence,
        )
        for result, of_rows in zip((out, lse, mass), results, strict=True):
            result[of_sequence] = of_rows[0].transpose(0, 1)
    return out, lse, mass


def _heads_first(sums: Tensor | None, rows: slice) -> Tensor | None:
    """(T, Hq, ...) as (1, Hq, rows, ...)."""
    return None if sums is None else sums[rows].transpose(0, 1)[None]
