"""What is verified: calls of every operator as users make them, each beside the same mathematics done densely."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moda_ext import reference
from moda_ext._ops.backend import use_backend
from moda_ext._ops.limits import accumulation_dtype
from moda_ext.functional.alignment import (
    causal_gram_projection,
    duplex_query_views,
    low_rank_weights,
    modality_gram,
)
from moda_ext.functional.attention import modular_attention, modular_attention_varlen
from moda_ext.functional.duplex import duplex_attention
from moda_ext.functional.paged import (
    NewTokens,
    Pages,
    StepTerms,
    paged_cache_update,
    paged_duplex_attention,
    paged_modular_attention,
    step,
)
from moda_ext.functional.parts import Keys, Terms, attend_part, differentiate_part, finish_bias_gradient, merge
from moda_ext.nn.aligner import DuplexAligner

Results: TypeAlias = dict[str, Tensor]
Call: TypeAlias = Callable[..., Results]

SIZES = (8, 32, 40, 64, 96, 128, 192, 256)  # of heads: every CUDA kernel, and sizes that fill no vector
LENGTHS = (1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 255, 257)  # around the tiles of every kernel
TOKENS = ("query", "key", "value", "new_key")  # in the dtype of a case; all other numbers in that of sums
RANK = 8
FULL: dict[str, Any] = {"return_lse": True, "return_mass": True}


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    Args:
        operator: whose native kernels it judges.
        make: the arguments by name, floating-point ones in float64, from a generator.
        ours, dense: from the arguments to results by name; ``dense`` computes in the dtype of the query, or key.
        differentiable: False for operators that have no derivative.
        wide: results that are as accurate as the dtype of sums, whatever that of the tokens is.
    """

    operator: str
    label: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], dict[str, Tensor]]
    ours: Call
    dense: Call
    differentiable: bool = True
    wide: tuple[str, ...] = ("lse", "mass", "indicator", "gram", "trace")

    def inputs(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """The arguments on a device, rounded to their dtypes; those that have a gradient ask for it."""
        made = {}
        for name, tensor in self.make(torch.Generator().manual_seed(seed)).items():
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype if name in TOKENS else accumulation_dtype(self.dtype))
                tensor.requires_grad_(self.differentiable)
            moved = tensor.to(device).detach()
            made[name] = moved.requires_grad_(tensor.requires_grad)
        return made


def cases(operator: str, dtypes: Sequence[torch.dtype], *, some: bool = False) -> Iterator[Case]:
    """All cases of an operator: every dtype and head size with every structure, at lengths that take turns.

    ``some``: a half or a third of them, with every two of a dtype, a head size and a structure together at least once.
    """
    structures, build = FAMILIES[operator]
    part = min(3, len(structures))
    turns = itertools.count()
    for (d, dtype), (n, size), (s, (label, structure)) in itertools.product(
        enumerate(dtypes), enumerate(SIZES), enumerate(structures.items())
    ):
        turn = next(turns)
        lengths = LENGTHS[5 * turn % len(LENGTHS)], LENGTHS[(3 * turn + 7) % len(LENGTHS)]
        if not some or (d + n + s) % part == 0:
            yield build(operator, f"{label}, D={size}, {str(dtype)[6:]}", dtype, size, lengths, **structure)


# Arguments ------------------------------------------------------------------------------------------------------------


def _ids(columns: int, modalities: int, run: int, padding: str) -> Tensor:
    """(2, columns): runs of modalities; the two rows begin at different ones."""
    ids = (torch.arange(columns) // run + torch.arange(2)[:, None]) % modalities
    ids[0, {"": slice(0), "left": slice(columns // 3), "right": slice(columns - columns // 3, None)}[padding]] = -1
    return ids


def _tokens(generator: torch.Generator, heads: int, rows: int, size: int, *outer: int) -> Tensor:
    """(..., 2, H, N, D), with the tokens outside of the heads in memory, as projections leave them."""
    return torch.randn(*outer, 2, rows, heads, size, generator=generator, dtype=torch.float64).transpose(-2, -3)


def _weights(generator: torch.Generator, modalities: int, size: int) -> dict[str, Tensor]:
    shapes = {"a1": (size, RANK), "b1": (RANK, size), "a2": (size, RANK), "b2": (RANK, size)}
    return {
        name: torch.randn(modalities, *shape, generator=generator, dtype=torch.float64) / 8
        for name, shape in shapes.items()
    }


def _cast(terms: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: term.to(dtype) if isinstance(term, Tensor) else term for name, term in terms.items()}


# Attention ------------------------------------------------------------------------------------------------------------

ATTENTION: dict[str, dict] = {
    "causal, grouped heads, left padding": {"heads": 8, "causal": True, "padding": "left", "modalities": 3},
    "causal, views, short runs": {"views": True, "run": 1, "causal": True, "modalities": 4},
    "all keys, hidden modalities": {"hidden": True, "padding": "right", "other_length": True},
    "chunk, views": {"heads": 4, "views": True, "causal": True, "columns": 270, "modalities": 3},
    "decoding": {"heads": 16, "causal": True, "rows": 1, "columns": 500},
    "more rows than keys": {"heads": 2, "causal": True, "rows": 270, "sink": False},
    "neither bias nor sink, one key head, heads first": {
        "heads": 3,
        "kv_heads": 1,
        "bias": False,
        "sink": False,
        "modalities": 1,
        "heads_first": True,
    },
    "many keys, out alone": {"heads": 4, "causal": True, "columns": 1100, "modalities": 6, "alone": True},
    "keys in two parts": {"heads": 4, "views": True, "other_length": True, "parts": True, "modalities": 3},
}


class _InParts(torch.autograd.Function):
    """(out, mass) of keys that come in two parts, as context parallelism has them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sink: Tensor, key_modality: Tensor
    ) -> tuple[Tensor, Tensor]:
        cut, modality = key.shape[2] // 3, key_modality.to(torch.int32)
        ctx.parts = [
            (
                Keys(key[:, :, part], value[:, :, part], modality[:, part]),
                Terms(
                    bias, sink if part.stop == key.shape[2] else None, bias.shape[-1], False, query.shape[-1] ** -0.5
                ),
            )
            for part in (slice(0, cut), slice(cut, key.shape[2]))
        ]
        rows = merge(*(attend_part(query, *part) for part in ctx.parts))
        ctx.rows = rows._replace(out=rows.out.to(query.dtype))
        ctx.save_for_backward(query, sink)
        return ctx.rows.out, ctx.rows.mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        query, sink = ctx.saved_tensors
        first, second = (
            differentiate_part(grad_out, grad_mass, query, keys, terms, ctx.rows, (True,) * 5, whole_rows=False)
            for keys, terms in ctx.parts
        )
        assert first.query is not None and second.query is not None, "asked for"
        assert first.modality_bias is not None and second.modality_bias is not None, "asked for"
        grad_query = (first.query.to(ctx.rows.lse.dtype) + second.query).to(query.dtype)
        grad_bias = first.modality_bias + second.modality_bias
        grad_key, grad_value = (
            torch.cat([t for t in tensors if t is not None], dim=2)
            for tensors in ((first.key, second.key), (first.value, second.value))
        )
        grad_bias = finish_bias_gradient(grad_bias, grad_out, grad_mass, ctx.rows, sink)
        return grad_query, grad_key, grad_value, grad_bias, second.sink, None


def _attention(
    operator: str,
    label: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int],
    *,
    heads: int = 2,
    kv_heads: int = 2,
    rows: int = 0,
    columns: int = 0,
    other_length: bool = False,
    modalities: int = 2,
    run: int = 50,
    padding: str = "",
    views: bool = False,
    hidden: bool = False,
    bias: bool = True,
    sink: bool = True,
    causal: bool = False,
    heads_first: bool = False,
    alone: bool = False,
    parts: bool = False,
) -> Case:
    rows = rows or lengths[0]
    columns = columns or (lengths[1] if other_length or rows == 270 else rows)

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = {
            "query": _tokens(generator, heads, rows, size, *((modalities,) if views else ())),
            "key": _tokens(generator, kv_heads, columns, size),
            "value": _tokens(generator, kv_heads, columns, size),
        }
        if heads_first:
            made = {name: tokens.contiguous() for name, tokens in made.items()}
        made["key_modality"] = _ids(columns, modalities, run, padding)
        if bias:
            made["modality_bias"] = torch.randn(2, heads, rows, modalities, generator=generator, dtype=torch.float64)
        if hidden:
            made["modality_bias"][:, :, ::3, 0] = -torch.inf
            made["modality_bias"][:, :, ::6] = -torch.inf  # rows that see nothing
        if sink:
            made["sink"] = torch.randn(2, heads, rows, generator=generator, dtype=torch.float64)
        return made

    options: dict[str, Any] = {"num_modalities": modalities, "is_causal": causal}

    def ours(query: Tensor, key: Tensor, value: Tensor, key_modality: Tensor, **terms: Any) -> Results:
        if alone:
            return {"out": modular_attention(query, key, value, key_modality, **terms, **options)}
        if parts:
            found = _InParts.apply(query, key, value, terms["modality_bias"], terms["sink"], key_modality)
            return dict(zip(("out", "mass"), found, strict=True))
        results = modular_attention(query, key, value, key_modality, **terms, **options, **FULL)
        return dict(zip(("out", "lse", "mass"), results, strict=True))

    def dense(query: Tensor, key: Tensor, value: Tensor, key_modality: Tensor, **terms: Any) -> Results:
        terms = _cast(terms, query.dtype)
        results = reference.dense_attention(query, key, value, key_modality, **terms, **options)
        named = dict(zip(("out", "lse", "mass"), results, strict=True))
        return {name: named[name] for name in (("out",) if alone else ("out", "mass") if parts else named)}

    return Case(operator, f"{label}, Nq={rows}, Nk={columns}", dtype, make, ours, dense)


PACKED: dict[str, dict] = {
    "causal": {"causal": True},
    "views": {"views": True},
}


def _packed(
    operator: str,
    label: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int],
    *,
    views: bool = False,
    causal: bool = False,
    modalities: int = 3,
    heads: int = 4,
) -> Case:
    of_queries = torch.tensor([lengths[0], 0, 40, lengths[1]])
    of_keys = torch.tensor([lengths[0] + 20, 10, 40, lengths[1]])
    offsets = {
        "cu_seqlens_q": torch.nn.functional.pad(of_queries.cumsum(0), (1, 0)),
        "cu_seqlens_k": torch.nn.functional.pad(of_keys.cumsum(0), (1, 0)),
    }
    rows, columns = int(of_queries.sum()), int(of_keys.sum())

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            "query": randn(*((modalities,) if views else ()), rows, heads, size),
            "key": randn(columns, 2, size),
            "value": randn(columns, 2, size),
            "key_modality": _ids(columns, modalities, 30, "left")[0],
            **offsets,
            "modality_bias": randn(rows, heads, modalities),
            "sink": randn(rows, heads),
        }

    options: dict[str, Any] = {"num_modalities": modalities, "is_causal": causal}
    longest = {"max_seqlen_q": int(of_queries.max()), "max_seqlen_k": int(of_keys.max())}

    def ours(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_modality: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        **terms: Any,
    ) -> Results:
        packed: dict[str, Any] = {**longest, **terms, **options, **FULL}
        results = modular_attention_varlen(query, key, value, key_modality, cu_seqlens_q, cu_seqlens_k, **packed)
        return dict(zip(("out", "lse", "mass"), results, strict=True))

    def dense(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_modality: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        *,
        modality_bias: Tensor,
        sink: Tensor,
    ) -> Results:
        row, column = torch.arange(rows, device=query.device), torch.arange(columns, device=query.device)
        of_row = torch.searchsorted(cu_seqlens_q, row, right=True)
        of_column = torch.searchsorted(cu_seqlens_k, column, right=True)
        visible = of_row[:, None] == of_column
        if causal:
            last = cu_seqlens_k[of_row] - (cu_seqlens_q[of_row] - row)
            visible = visible & (column <= last[:, None])
        query, key, value = (t.transpose(-2, -3).unsqueeze(-4) for t in (query, key, value))
        out, lse, mass = reference.dense_attention(
            query,
            key,
            value,
            key_modality[None],
            num_modalities=modalities,
            modality_bias=modality_bias.to(query.dtype).transpose(0, 1)[None],
            sink=sink.to(query.dtype).T[None],
            visible=visible,
        )
        return {"out": out[0].transpose(0, 1), "lse": lse[0].T, "mass": mass[0].transpose(0, 1)}

    return Case(operator, f"{label}, {rows} queries and {columns} keys in all", dtype, make, ours, dense)


# Alignment ------------------------------------------------------------------------------------------------------------

GRAMS: dict[str, dict] = {
    "unit keys, padding": {"padding": "left", "modalities": 3},
    "raw keys, normalised by row": {"key_norm": None, "normalize": "row", "run": 1},
    "the sums themselves": {"normalize": None, "padding": "right", "modalities": 5},
}


def _gram(
    operator: str,
    label: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int],
    *,
    padding: str = "",
    modalities: int = 2,
    run: int = 40,
    **options: Any,
) -> Case:
    columns = 3 * lengths[0]

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {"key": _tokens(generator, 2, columns, size), "modality": _ids(columns, modalities, run, padding)}

    def through(function: Callable[..., Tensor]) -> Call:
        return lambda key, modality: {"gram": function(key, modality, modalities, **options)}

    ours, dense = through(modality_gram), through(reference.modality_gram)
    return Case(operator, f"{label}, N={columns}", dtype, make, ours, dense)


CAUSAL: dict[str, dict] = {
    "grouped heads, padding": {"heads": 8, "padding": "left", "modalities": 3},
    "after a state": {"state": True, "chunk": 30, "run": 7},
    "raw keys, Frobenius norm": {"key_norm": None, "normalize": "frobenius", "run": 30},
}


def _causal(
    operator: str,
    label: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int],
    *,
    heads: int = 2,
    padding: str = "",
    modalities: int = 2,
    run: int = 40,
    state: bool = False,
    chunk: int = 0,
    **norms: str | None,
) -> Case:
    """``causal_gram_projection``, ``duplex_query_views`` or, attending too, ``duplex_attention``."""
    rows = lengths[0]
    columns = rows + chunk
    attends = operator == "duplex_attention"

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = {"query": _tokens(generator, heads, rows, size), "key": _tokens(generator, 2, columns, size)}
        made["modality"] = _ids(columns, modalities, run, padding)
        if operator != "causal_gram_projection":
            made |= _weights(generator, modalities, size)
        if state:
            made["root"] = torch.randn(2, 2, modalities, size, size, generator=generator, dtype=torch.float64)
        if attends:
            made["value"] = _tokens(generator, 2, columns, size)
            made["modality_bias"] = torch.randn(2, heads, rows, modalities, generator=generator, dtype=torch.float64)
            made["condition"] = torch.randn(heads, 1, modalities, generator=generator, dtype=torch.float64)
            made["sink"] = torch.randn(2, heads, rows, generator=generator, dtype=torch.float64)
        return made

    def aligned(function: Callable, given: dict[str, Tensor], **options: Any) -> Any:
        given = dict(given)
        modality, root = given.pop("modality"), given.pop("root", None)
        trace = None if root is None else root.square().sum(dim=(-1, -2)) + 1
        before = None if root is None else (root.mT @ root, trace)
        return function(
            query_modality=modality[:, chunk:],
            key_modality=modality,
            num_modalities=modalities,
            state=before,
            **given,
            **norms,
            **options,
        )

    def through(project: Callable, views_of: Callable) -> Call:
        def call(**given: Tensor) -> Results:
            if operator == "causal_gram_projection":
                out, (gram, trace) = aligned(project, given, return_state=True)
                return {"out": out, "gram": gram, "trace": trace}
            views, indicator, (gram, trace) = aligned(views_of, given, return_indicator=True, return_state=True)
            return {"views": views, "indicator": indicator, "gram": gram, "trace": trace}

        return call

    def fused(**given: Tensor) -> Results:
        return dict(zip(("out", "lse", "mass"), aligned(duplex_attention, given, **FULL), strict=True))

    def in_two_steps(value: Tensor, modality_bias: Tensor, condition: Tensor, sink: Tensor, **given: Tensor) -> Results:
        views, indicator = aligned(reference.duplex_query_views, given, return_indicator=True)
        terms = {"modality_bias": modality_bias + condition * indicator, "sink": sink}
        results = reference.dense_attention(
            views,
            given["key"],
            value,
            given["modality"],
            num_modalities=modalities,
            is_causal=True,
            **_cast(terms, value.dtype),
        )
        return dict(zip(("out", "lse", "mass"), results, strict=True))

    ours = fused if attends else through(causal_gram_projection, duplex_query_views)
    of_reference = through(reference.causal_gram_projection, reference.duplex_query_views)
    dense = in_two_steps if attends else of_reference
    case = Case(operator, f"{label}, Nq={rows}, Nk={columns}", dtype, make, ours, dense)
    # Views are rounded to the dtype of the query, so nothing that is made of them is more accurate.
    return replace(case, differentiable=False, wide=()) if attends else case


def _aligned_keys(
    operator: str, label: str, dtype: torch.dtype, size: int, lengths: tuple[int, int], *, modalities: int
) -> Case:
    columns = 2 * lengths[0]

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = {"key": _tokens(generator, 2, columns, size), "modality": _ids(columns, modalities, 40, "left")}
        return made | _weights(generator, modalities, size)

    def ours(key: Tensor, modality: Tensor, **weights: Tensor) -> Results:
        aligner = DuplexAligner(size, num_modalities=modalities, scope="full", rank=RANK).to(key.device)
        for name, weight in weights.items():
            setattr(aligner, name, torch.nn.Parameter(weight))
        return {"keys": aligner.align_keys(key, modality)}

    def dense(**given: Tensor) -> Results:
        with use_backend("reference"):
            return ours(**given)

    return Case(operator, f"{label}, N={columns}", dtype, make, ours, dense, False)


# Pages ----------------------------------------------------------------------------------------------------------------

PAGES: dict[str, dict] = {
    "a prompt, decoding, chunks": {},
    "grouped heads, blocks of 1": {"heads": 8, "block": 1, "modalities": 3},
}


def _paged(
    operator: str,
    label: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int],
    *,
    heads: int = 4,
    block: int = 16,
    modalities: int = 2,
) -> Case:
    """Pages in any order that ``paged_cache_update`` fills, and what is made of them."""
    of_sequences = torch.tensor([lengths[0], lengths[1] + 1, 0, 40, 300])
    of_rows = torch.tensor([lengths[0], 1, 0, 5, 25])
    tokens, rows = int(of_sequences.sum()), int(of_rows.sum())
    pages = -(-of_sequences // block)
    duplex = operator in ("paged_duplex_attention", "paged_attention_step")
    # Rows are the last tokens of their sequences.
    taken = torch.arange(rows) + (of_sequences.cumsum(0) - of_rows.cumsum(0)).repeat_interleave(of_rows)

    in_tables = operator == "paged_attention_step"  # rows of modalities and, some fewer than there are, of positions
    of_biases, of_sinks = (modalities, int(of_sequences.max()) - 20) if in_tables else (rows, rows)

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        order = torch.randperm(int(pages.sum()) + 3, generator=generator)
        table = torch.zeros(len(pages), int(pages.max()), dtype=torch.int64)
        table[torch.arange(table.shape[1]) < pages[:, None]] = order[: int(pages.sum())]
        place = torch.cat([torch.arange(length) for length in of_sequences.tolist()])
        page = table[torch.arange(len(pages)).repeat_interleave(of_sequences), place // block]
        made = {
            "key": randn(tokens, 2, size),
            "value": randn(tokens, 2, size),
            "modality": _ids(tokens, modalities, 25, "")[0],
            "slot_mapping": page * block + place % block,
        }
        if operator == "paged_cache_update":
            return made
        made |= {
            "query": randn(rows, heads, size),
            "block_table": table,
            "seq_lens": of_sequences,
            "query_start_loc": torch.nn.functional.pad(of_rows.cumsum(0), (1, 0)),
            "modality_bias": randn(of_biases, heads, modalities),
            "sink": randn(of_sinks, heads),
        }
        if duplex:
            made |= {"condition": randn(of_biases, heads, modalities), **_weights(generator, modalities, size)}
        return made

    def empty_cache(like: Tensor) -> Tensor:
        return like.new_zeros(int(pages.sum()) + 3, block, 2, 2 * size + 8).transpose(1, 2)

    def in_a_step(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        modality: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        modality_bias: Tensor,
        condition: Tensor,
        sink: Tensor,
        **weights: Tensor,
    ) -> Results:
        cache, own = empty_cache(key), taken.to(key.device)
        paged_cache_update(key, value, modality, cache, slot_mapping.index_fill(0, own, -1))
        tokens = NewTokens(key[own], value[own], modality[own].int(), slot_mapping[own])
        low_rank = low_rank_weights((weights["a1"], weights["b1"], weights["a2"], weights["b2"]), sink.dtype)
        terms = StepTerms(modalities, size**-0.5, modality_bias, condition, sink, weights=low_rank)
        located = Pages(cache, block_table.int(), seq_lens.int(), query_start_loc.int())
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        return {"mass": step(query, tokens, located, terms, out), "out": out}

    def through(update: Callable, attend: Callable, modular: Callable, **options: Any) -> Call:
        def call(key: Tensor, value: Tensor, modality: Tensor, slot_mapping: Tensor, **given: Tensor) -> Results:
            cache = empty_cache(key)
            update(key, value, modality, cache, slot_mapping)
            if operator == "paged_cache_update":
                return {"cells": cache}
            shared: dict[str, Any] = {"kv_cache": cache, "num_modalities": modalities, **options, **given}
            own = modality[taken.to(modality.device)]
            if in_tables:
                place = (torch.cat([torch.arange(n) for n in of_sequences.tolist()])[taken]).to(own.device)
                picks = {"modality_bias": own, "condition": own, "sink": place.clamp(max=of_sinks - 1)}
                shared |= {name: shared[name][pick] for name, pick in picks.items()}
            results = attend(query_modality=own, **shared) if duplex else modular(**shared)
            named = dict(zip(("out", "lse", "mass"), results, strict=True))
            return {n: r for n, r in named.items() if n != "lse"} if in_tables else named

        return call

    ours = through(paged_cache_update, paged_duplex_attention, paged_modular_attention, **FULL)
    dense = through(reference.paged_cache_update, reference.paged_duplex_attention, reference.paged_modular_attention)
    if in_tables:
        ours = in_a_step
    case = Case(operator, f"{label}, {rows} rows of {tokens} tokens", dtype, make, ours, dense, False)
    return replace(case, wide=()) if duplex else case


FAMILIES: dict[str, tuple[dict[str, dict], Callable[..., Case]]] = {
    "modular_attention": (ATTENTION, _attention),
    "modular_attention_varlen": (PACKED, _packed),
    "modality_gram": (GRAMS, _gram),
    "causal_gram_projection": (CAUSAL, _causal),
    "duplex_query_views": (CAUSAL, _causal),
    "duplex_attention": (CAUSAL, _causal),
    "duplex_aligned_keys": ({"two modalities": {"modalities": 2}, "three": {"modalities": 3}}, _aligned_keys),
    "paged_modular_attention": (PAGES, _paged),
    "paged_duplex_attention": (PAGES, _paged),
    "paged_cache_update": (PAGES, _paged),
    "paged_attention_step": (PAGES, _paged),
}
