"""Contenders of the kind ``paged``: a cache in pages, of which a step of serving reads one row's keys or a chunk's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moda_ext.attention import paged_cache_update, paged_duplex_attention, paged_modular_attention

from .aligner import WEIGHTS, aligner_work, dense_aligned
from .peers import TERMS, TOKENS, Call, Contender, build_ours, build_sdpa, causal_mask
from .workloads import Case, Inputs

BLOCK = 16  # tokens of a page
NAMES = ("out", "lse", "mass")


def _pages(case: Case, x: Inputs) -> tuple[torch.Tensor, ...]:
    """(kv_cache, block_table, seq_lens, query_start_loc) of the keys of a case, in pages of any order."""
    count = -(-case.num_keys // BLOCK)
    order = torch.randperm(count + 8, generator=torch.Generator().manual_seed(0))[:count]
    cache = x.key.new_zeros(count + 8, case.key_heads, BLOCK, 2 * case.head_dim + 16 // case.dtype.itemsize)
    token = torch.arange(case.num_keys)
    slots = order[token // BLOCK] * BLOCK + token % BLOCK
    paged_cache_update(x.key[0].transpose(0, 1), x.value[0].transpose(0, 1), x.key_modality[0], cache, slots)
    lengths, rows = ((case.num_keys,), (0, case.rows))
    return (cache, order[None].int(), *(torch.tensor(n, dtype=torch.int32) for n in (lengths, rows)))


def _dense(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(result.transpose(0, 1)[None] for result in results)


def _terms(x: Inputs) -> dict:
    """Bias and sink of packed rows."""
    terms = {"modality_bias": x.bias[0].transpose(0, 1).contiguous(), "sink": x.sink[0].T.contiguous()}
    return terms | {"return_lse": True, "return_mass": True}


def build_paged(case: Case, x: Inputs) -> Call:
    query, pages, terms = x.query[0].transpose(0, 1), _pages(case, x), _terms(x)
    return lambda: _dense(paged_modular_attention(query, *pages, num_modalities=case.num_modalities, **terms))


def build_paged_duplex(case: Case, x: Inputs) -> Call:
    query, pages, terms = x.query[0].transpose(0, 1), _pages(case, x), _terms(x)
    modality = x.key_modality[0, -case.rows :]
    weights = dict(zip(WEIGHTS, x.leaves(WEIGHTS), strict=True))
    options = {"num_modalities": case.num_modalities, "condition": torch.ones(()), **weights, **terms}
    return lambda: _dense(paged_duplex_attention(query, modality, *pages, **options))


def build_gathered_sdpa(case: Case, x: Inputs) -> Call:
    """Keys in a row beforehand: a serving engine would gather them in each call."""
    if case.rows == 1:
        return build_sdpa(case, x)
    mask = causal_mask(case)
    return lambda: (F.scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=mask, enable_gqa=True),)


PAGED = [
    Contender("paged", "attention on pages, bias and sink", build_paged, NAMES, ours=True),
    Contender(
        "paged-duplex",
        "aligner, indicator and attention on pages",
        build_paged_duplex,
        NAMES,
        (*TOKENS, *TERMS, *WEIGHTS),
        dense_aligned,
        work=lambda case: aligner_work(case) + case.useful_flops("forward"),
        ours=True,
    ),
    Contender("contiguous", "ours on keys in a row", build_ours, NAMES, ours=True),
    Contender("sdpa-gathered", "torch SDPA, plain, on keys gathered beforehand", build_gathered_sdpa, leaves=TOKENS),
]
