"""Attention on a cache in pages, as serving engines keep it: the tokens of all sequences in blocks of one tensor.

A cell of the cache, one token of one key head, is [key D | value D | modality | unused]. The modality travels with what
it belongs to, so that shared prefixes, preemption and copies of blocks need nothing of their own; and the Gram of an
aligner is made of the cached keys whenever it is wanted, so that no sequence has a state beside its pages.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ext._ops import autocast, backend, operators
from moda_ext._ops.limits import FLOATS, INTEGERS, KEY_NORMS, MAX_MODALITIES, OFFSETS, accumulation_dtype
from moda_ext.functional import checks
from moda_ext.functional.alignment import check_fuser, low_rank_weights
from moda_ext.functional.attention import (
    Results,
    as_int32,
    attention_options,
    expand,
    last_contiguous,
    modular_attention,
    pack_results,
)
from moda_ext.functional.duplex import duplex_attention


def paged_cache_update(key: Tensor, value: Tensor, modality: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write tokens into their cells of a cache in pages, in place.

    Args:
        key: (T, Hkv, D), float32, float64, bfloat16 or float16.
        value: like ``key``.
        modality: (T,), integer: of each token in [0, 16), or -1 for padding, which nobody sees.
        kv_cache: (blocks, Hkv, block size, C) with C > 2 D, dtype and device of ``key``, of any strides but in its last
            dimension; **updated in place**. A cell is [key D | value D | modality | unused].
        slot_mapping: (T,), integer: for each token block * block size + place in the block; a token of a negative slot
            is written nowhere.

    Raises:
        ValueError: a shape does not fit, or (on the CPU) a slot or a modality is out of range; nothing is written then.
        TypeError: an argument is not a tensor, or has the wrong dtype.

    Example:
        >>> cache = torch.zeros(4, 2, 16, 2 * 64 + 8)
        >>> key, value = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
        >>> paged_cache_update(key, value, torch.tensor([0, 1, 1]), cache, torch.tensor([16, 17, 18]))
        >>> torch.equal(cache[1, :, 0, :64], key[0]), cache[1, 0, :3, 128].tolist()
        (True, [0.0, 1.0, 1.0])
    """
    op = "paged_cache_update"
    for name, tensor in (("key", key), ("value", value)):
        checks.tensor(op, name, tensor)
        checks.rank(op, name, tensor, 3, "(T, Hkv, D)")
        checks.dtype(op, name, tensor, FLOATS)
    tokens, heads, size = key.shape
    checks.shape(op, "value", value, key.shape, "of key")
    _check_same(op, "value", value, key, "key")
    _check_cache(op, kv_cache, key, size, "key")
    if kv_cache.shape[1] != heads:
        checks.mismatch(op, "kv_cache", "the heads of key", heads, kv_cache.shape[1])
    for name, tensor in (("modality", modality), ("slot_mapping", slot_mapping)):
        _check_integers(op, name, tensor, key, (tokens,), "(T,)", "key")
    write(key, value, as_int32(modality), kv_cache, slot_mapping.to(torch.int64))


def paged_modular_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    num_modalities: int = 2,
    modality_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    r""":func:`modular_attention` on a cache in pages: causal, for sequences of any lengths at once.

    Each sequence has some rows, its last tokens, whose keys are in the cache already
    (:func:`paged_cache_update`): all of a prompt, a chunk of it, or the one token that is decoded. The equation is that
    of ``modular_attention`` with ``is_causal=True``, sequence by sequence.

    On the CPU keys, values and modalities are read from the pages; elsewhere they are gathered, which takes memory for
    as many sequences of the longest length. Source: MODA (arXiv 2507.04635), Eq. 7-10.

    Args:
        query: (T, Hq, D), or (M, T, Hq, D): one view of the query per key modality. float32, float64, bfloat16 or
            float16; D is a multiple of 8 from 8 to 256.
        kv_cache: (blocks, Hkv, block size, C) with C > 2 D, dtype and device of ``query``; cells are [key D | value D |
            modality | unused]. Hq is a multiple of Hkv. Blocks may be shared between sequences.
        block_table: (S, n), integer: the blocks of each sequence, in order. Entries beyond its length are not read.
        seq_lens: (S,), integer: tokens of each sequence, its rows among them.
        query_start_loc: (S + 1,), integer: the rows of sequence s are ``query_start_loc[s]`` to
            ``query_start_loc[s + 1]``. Rows beyond the last give 0.
        max_seqlen_q: at least the most rows of a sequence, None to look. Where keys are gathered, looking waits for the
            device.
        max_seqlen_k: the same for ``seq_lens``.
        num_modalities: M, 1 to 16.
        modality_bias: broadcastable to (T, Hq, M), in the dtype of ``query`` or of ``lse``.
        sink: broadcastable to (T, Hq), natural logarithm.
        scale: factor of the scores, by default D ** -0.5.
        return_lse, return_mass: also return ``lse`` (T, Hq), and ``mass`` (T, Hq, M).

    Returns:
        ``out`` (T, Hq, D) in the dtype of ``query``, or the tuple ``(out[, lse][, mass])`` of what was asked for.

    Raises:
        ValueError: a shape does not fit, or (on the CPU) a block, a length, an offset or a modality is out of range.
        TypeError: an argument is not a tensor, or has the wrong dtype.
        NotImplementedError: no kernel for this head size, dtype or device.

    Example:
        >>> cache, table = torch.zeros(4, 2, 16, 2 * 64 + 8), torch.tensor([[2, 0], [1, 3]])
        >>> key, value = torch.randn(20, 2, 64), torch.randn(20, 2, 64)  # 19 tokens of one sequence, 1 of another
        >>> slots = torch.tensor([*range(32, 48), 0, 1, 2, 16])
        >>> paged_cache_update(key, value, torch.zeros(20, dtype=torch.int32), cache, slots)
        >>> query, rows = torch.randn(4, 8, 64), torch.tensor([0, 3, 4])
        >>> paged_modular_attention(query, cache, table, torch.tensor([19, 1]), rows).shape
        torch.Size([4, 8, 64])
    """
    op = "paged_modular_attention"
    rows = _check_paged(op, query, kv_cache, block_table, seq_lens, query_start_loc, max_seqlen_q, max_seqlen_k)
    attention_options(op, num_modalities, True, scale)
    if query.dim() == 4 and query.shape[0] != num_modalities:
        checks.mismatch(op, "query", "num_modalities views in its first dimension", num_modalities, query.shape[0])
    _check_sums(op, query, modality_bias, sink, None, num_modalities)
    pages = Pages(kv_cache, *_integers(block_table, seq_lens, query_start_loc), max_seqlen_q, max_seqlen_k)
    out, lse, mass = attend(
        query,
        pages,
        num_modalities,
        modality_bias=expand(modality_bias, (*rows, num_modalities), query.dtype),
        sink=expand(sink, rows, query.dtype),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return pack_results(out, lse, mass, return_lse, return_mass)


def paged_duplex_attention(
    query: Tensor,
    query_modality: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    a1: Tensor,
    b1: Tensor,
    a2: Tensor,
    b2: Tensor,
    num_modalities: int = 2,
    key_norm: str | None = "l2",
    normalize: str | None = "trace",
    eps: float = 1e-6,
    modality_bias: Tensor | None = None,
    condition: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Results:
    r""":func:`duplex_attention` on a cache in pages, for sequences of any lengths at once; no sequence has a state.

    The Gram of a row is that of the cached keys before it. A row that is decoded needs none: with
    :math:`x_i = q_i W_{2,a}^\top`, the product :math:`x_i G^m_i = \sum_{j \le i, a_j = m} (x_i \cdot \phi_j) \phi_j`
    is a linear attention over the same pages, one more pass over their keys. Source: MODA (arXiv 2507.04635), Eq. 5-10;
    docs/mathematics.md sections 1 and 2.

    Args:
        query: (T, Hq, D), as in :func:`paged_modular_attention`, and so are kv_cache, block_table, seq_lens,
            query_start_loc, max_seqlen_q, max_seqlen_k, num_modalities, modality_bias, sink, scale, return_lse and
            return_mass.
        query_modality: (T,), integer, -1 for padding.
        a1: (M, D, rank), like b1, a2 and b2 as in :func:`moda_ext.alignment.duplex_query_views`, and so are key_norm,
            normalize and eps. With ``normalize="frobenius"``, whose norm takes the Gram itself, keys are gathered on
            every device.
        condition: broadcastable to (T, Hq, M): the factor of the indicator; None is 0.

    Returns:
        As :func:`paged_modular_attention`.

    Raises:
        ValueError, TypeError, NotImplementedError: as the two functions.

    Example:
        >>> cache, table = torch.randn(4, 2, 16, 2 * 64 + 8), torch.tensor([[2, 0]])
        >>> cache[..., 128] = torch.randint(0, 2, (4, 1, 16))
        >>> a, b = torch.randn(2, 64, 16), torch.randn(2, 16, 64)
        >>> query, modality = torch.randn(1, 8, 64), torch.tensor([0])
        >>> lengths, rows = torch.tensor([19]), torch.tensor([0, 1])
        >>> paged_duplex_attention(query, modality, cache, table, lengths, rows, a1=a, b1=b, a2=a, b2=b).shape
        torch.Size([1, 8, 64])
    """
    op = "paged_duplex_attention"
    weights = (a1, b1, a2, b2)
    checks.tensor(op, "query", query)
    checks.rank(op, "query", query, 3, "(T, Hq, D)")
    rows = _check_paged(op, query, kv_cache, block_table, seq_lens, query_start_loc, max_seqlen_q, max_seqlen_k)
    attention_options(op, num_modalities, True, scale)
    _check_integers(op, "query_modality", query_modality, query, rows[:1], "(T,)")
    checks.choice(op, "key_norm", key_norm, KEY_NORMS)
    checks.choice(op, "normalize", normalize, ("trace", "frobenius", None))
    checks.positive(op, "eps", eps)
    check_fuser(op, query, num_modalities, *weights)
    _check_sums(op, query, modality_bias, sink, condition, num_modalities)
    pages = Pages(kv_cache, *_integers(block_table, seq_lens, query_start_loc), max_seqlen_q, max_seqlen_k)
    out, lse, mass = align_and_attend(
        query,
        as_int32(query_modality),
        pages,
        low_rank_weights(weights, accumulation_dtype(query.dtype)),
        num_modalities,
        key_norm=key_norm,
        normalize=normalize,
        eps=eps,
        modality_bias=expand(modality_bias, (*rows, num_modalities), query.dtype),
        condition=expand(condition, (*rows, num_modalities), query.dtype),
        sink=expand(sink, rows, query.dtype),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return pack_results(out, lse, mass, return_lse, return_mass)


class Pages(NamedTuple):
    """The pages of some sequences, and which of their last tokens are the rows of a call: arguments of these names of
    :func:`moda_ext.attention.paged_modular_attention`, integers in int32."""

    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def write(key: Tensor, value: Tensor, modality: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """:func:`paged_cache_update` of arguments that are checked, in the form of the operator."""
    if backend.choose("paged_cache_update", key, value, kv_cache, name="key") == backend.NATIVE:
        operators.paged_cache_update(
            key=last_contiguous(key),
            value=last_contiguous(value),
            modality=modality,
            kv_cache=kv_cache,
            slot_mapping=slot_mapping,
        )
        return
    block = kv_cache.shape[2]
    beyond = slot_mapping >= kv_cache.shape[0] * block
    checks.on_host(beyond, "paged_cache_update: slot_mapping has a slot beyond kv_cache")
    checks.ids("paged_cache_update", "modality", modality, MAX_MODALITIES)
    tokens, heads, size = key.shape
    if tokens == 0 or kv_cache.numel() == 0:
        return
    new = torch.cat([key, value, modality.to(key.dtype)[:, None, None].expand(-1, heads, 1)], dim=-1)
    # A token of no cell repeats what the first token of one writes; where all are such, a cell keeps what it has. So no
    # device is waited for, as it would be to drop them.
    written = slot_mapping >= 0
    repeated = torch.where(written, torch.arange(tokens, device=key.device), written.int().argmax())
    slots = slot_mapping[repeated].clamp(min=0)
    cells = kv_cache.transpose(1, 2)[..., : 2 * size + 1]  # (blocks, block, Hkv, 2 D + 1)
    new = torch.where(written.any(), new[repeated], cells[slots // block, slots % block])
    cells[slots // block, slots % block] = new


def attend(
    query: Tensor,
    pages: Pages,
    num_modalities: int,
    *,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`paged_modular_attention` of arguments that are checked, in the form of the operator."""
    if backend.choose("paged_modular_attention", query, pages.kv_cache, modality_bias, sink) == backend.NATIVE:
        return operators.paged_modular_attention(
            query=last_contiguous(query),
            kv_cache=pages.kv_cache,
            block_table=pages.block_table,
            seq_lens=pages.seq_lens,
            query_start_loc=pages.query_start_loc,
            modality_bias=modality_bias,
            sink=sink,
            num_modalities=num_modalities,
            scale=scale,
        )
    with autocast.suspended(query):  # nor have the operators any
        gathered = _Gathered("paged_modular_attention", query, pages, num_modalities)
        results = modular_attention(
            gathered.rows_of(query, -3),
            gathered.key,
            gathered.value,
            gathered.modality,
            num_modalities=num_modalities,
            modality_bias=gathered.of_each_row(modality_bias),
            sink=gathered.of_each_row(sink),
            is_causal=True,
            scale=scale,
            return_lse=True,
            return_mass=True,
        )
        return gathered.packed(results)


def align_and_attend(
    query: Tensor,
    query_modality: Tensor,
    pages: Pages,
    weights: dict[str, Tensor],
    num_modalities: int,
    *,
    key_norm: str | None,
    normalize: str | None,
    eps: float,
    modality_bias: Tensor | None,
    condition: Tensor | None,
    sink: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`paged_duplex_attention` of arguments that are checked, in the form of the operator."""
    others = pages.kv_cache, *weights.values(), modality_bias, condition, sink
    chosen = backend.choose("paged_duplex_attention", query, *others)
    if chosen == backend.NATIVE and normalize != "frobenius":
        return operators.paged_duplex_attention(
            query=last_contiguous(query),
            query_modality=query_modality,
            kv_cache=pages.kv_cache,
            block_table=pages.block_table,
            seq_lens=pages.seq_lens,
            query_start_loc=pages.query_start_loc,
            **weights,
            modality_bias=modality_bias,
            condition=condition,
            sink=sink,
            num_modalities=num_modalities,
            unit_keys=key_norm == "l2",
            by_trace=normalize == "trace",
            eps=float(eps),
            scale=scale,
        )
    with autocast.suspended(query):
        gathered = _Gathered("paged_duplex_attention", query, pages, num_modalities)
        results = duplex_attention(
            gathered.rows_of(query, -3),
            gathered.key,
            gathered.value,
            gathered.rows_of(query_modality, 0, padding=-1),
            gathered.modality,
            weights["a1"],
            weights["b1"],
            weights["a2"],
            weights["b2"],
            num_modalities,
            key_norm=key_norm,
            normalize=normalize,
            eps=eps,
            modality_bias=gathered.of_each_row(modality_bias),
            condition=gathered.of_each_row(condition),
            sink=gathered.of_each_row(sink),
            scale=scale,
            return_lse=True,
            return_mass=True,
        )
        return gathered.packed(results)


@dataclasses.dataclass(frozen=True)
class StepTerms:
    """What no step changes of a layer. Tables say what is added to the scores of a row, by its modality and by its
    position: in the dtype of sums, None for nothing. The others are arguments of :func:`paged_duplex_attention`."""

    num_modalities: int
    scale: float
    modality_bias: Tensor | None = None  # (M, Hq, M), [modality of the row, head, modality of the key]
    condition: Tensor | None = None  # (M, Hq, M)
    sink: Tensor | None = None  # (positions, Hq), of which the last stands for all beyond
    weights: dict[str, Tensor] | None = None  # None for no aligner
    key_norm: str | None = "l2"
    normalize: str | None = "trace"
    eps: float = 1e-6

    @functools.cached_property
    def operands(self) -> dict[str, Any]:
        """Arguments of the operator."""
        return {
            **(self.weights or dict.fromkeys(("a1", "b1", "a2", "b2"))),
            "modality_bias": self.modality_bias,
            "condition": self.condition,
            "sink": self.sink,
            "num_modalities": self.num_modalities,
            "unit_keys": self.key_norm == "l2",
            "by_trace": self.normalize == "trace",
            "eps": float(self.eps),
            "scale": self.scale,
        }

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.modality_bias, self.condition, self.sink, *(self.weights or {}).values()


class NewTokens(NamedTuple):
    """The rows of a step, the last tokens of their sequences, which get into the pages first: arguments of
    :func:`moda_ext.attention.paged_cache_update`."""

    key: Tensor
    value: Tensor
    modality: Tensor
    slot_mapping: Tensor


def step(
    query: Tensor, tokens: NewTokens, pages: Pages, terms: StepTerms, out: Tensor, chosen: str | None = None
) -> Tensor:
    """:func:`paged_cache_update`, then :func:`paged_modular_attention` or, with weights,
    :func:`paged_duplex_attention`: a layer's part of a step of serving, where few tokens are over before several
    operators would be called.

    Args:
        query: (T, Hq, D).
        out: (T, Hq, D), **written**.
        chosen: the backend of "paged_attention_step", for callers that ask once for many calls.

    Returns:
        ``mass`` (T, Hq, M).
    """
    if chosen is None:
        chosen = backend.choose("paged_attention_step", query, pages.kv_cache, *terms.tensors)
    key, value, modality, slot_mapping = tokens
    if chosen == backend.NATIVE and not (terms.weights and terms.normalize == "frobenius"):
        return operators.paged_attention_step(
            query=last_contiguous(query),
            key=last_contiguous(key),
            value=last_contiguous(value),
            modality=modality,
            slot_mapping=slot_mapping,
            kv_cache=pages.kv_cache,
            block_table=pages.block_table,
            seq_lens=pages.seq_lens,
            query_start_loc=pages.query_start_loc,
            out=out,
            **terms.operands,
        )
    write(key, value, modality, pages.kv_cache, slot_mapping)
    of_row, sink = modality.clamp(min=0), terms.sink
    bias, condition = (t if t is None else t.index_select(0, of_row) for t in (terms.modality_bias, terms.condition))
    if sink is not None:
        position = positions_of_rows(pages.seq_lens, pages.query_start_loc, len(query))
        sink = sink.index_select(0, position.clamp(0, len(sink) - 1))
    added = {"modality_bias": bias, "sink": sink}
    if terms.weights is None:
        found, _, mass = attend(query, pages, terms.num_modalities, **added, scale=terms.scale)
    else:
        found, _, mass = align_and_attend(
            query,
            modality,
            pages,
            terms.weights,
            terms.num_modalities,
            key_norm=terms.key_norm,
            normalize=terms.normalize,
            eps=terms.eps,
            condition=condition,
            **added,
            scale=terms.scale,
        )
    out.copy_(found)
    return mass


def positions_of_rows(seq_lens: Tensor, query_start_loc: Tensor, rows: int) -> Tensor:
    """(T,): the place of each row in its sequence, from 0."""
    row = torch.arange(rows, device=seq_lens.device)
    ends = query_start_loc[1:].long()
    sequence = torch.searchsorted(ends, row, right=True).clamp(max=max(0, seq_lens.shape[0] - 1))
    return seq_lens[sequence] - (ends[sequence] - row)


def _integers(block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the operators take them."""
    return as_int32(block_table), as_int32(seq_lens), as_int32(query_start_loc)


class _Gathered:
    """A paged call in the form of the dense operators: sequences of one length, their ends aligned, padding before."""

    def __init__(self, op: str, query: Tensor, pages: Pages, num_modalities: int):
        kv_cache, block_table, seq_lens, query_start_loc, max_seqlen_q, max_seqlen_k = pages
        head_size, self._rows = query.shape[-1], query.shape[-3]
        starts, ends = query_start_loc[:-1, None].long(), query_start_loc[1:, None].long()  # (S, 1)
        some = len(seq_lens) > 0
        if max_seqlen_q is None:
            max_seqlen_q = int((ends - starts).max()) if some else 0
        if max_seqlen_k is None:
            max_seqlen_k = int(seq_lens.max()) if some else 0
        blocks, block = kv_cache.shape[0], kv_cache.shape[2]
        _check_lengths(op, self._rows, block_table.shape[1] * block, pages, max_seqlen_q, max_seqlen_k)
        place = torch.arange(-max_seqlen_k, 0, device=kv_cache.device) + seq_lens[:, None].long()  # (S, most keys)
        padding, place = place < 0, place.clamp(min=0)
        page = block_table.long().gather(1, place // block)
        outside = ~padding & ((page < 0) | (page >= blocks))
        checks.on_host(outside, f"{op}: block_table: expected blocks from 0 to {blocks - 1} within a sequence's length")
        page = page.masked_fill(padding, 0)  # what lies beyond a length may hold anything
        cells = kv_cache.transpose(1, 2)[page, place % block]  # (S, most keys, Hkv, C)
        cells = cells.masked_fill(padding[..., None, None], 0).transpose(1, 2)
        self.key, self.value = cells[..., :head_size], cells[..., head_size : 2 * head_size]
        ids = cells[:, 0, :, 2 * head_size]
        none = ~((ids >= -1) & (ids < num_modalities) & (ids == ids.floor()))
        checks.on_host(none, f"{op}: kv_cache: expected modalities from -1 to {num_modalities - 1}")
        self.modality = ids.to(torch.int32).masked_fill(padding, -1)
        self._most_rows = max_seqlen_q
        self._row = torch.arange(-max_seqlen_q, 0, device=kv_cache.device) + ends  # (S, most rows)
        self._absent = self._row < starts
        self._ends = ends.squeeze(1)

    def rows_of(self, packed: Tensor, tokens: int, padding: int = 0) -> Tensor:
        """(..., T, H, D) as (..., S, H, rows, D), or (T,) as (S, rows)."""
        taken = packed.movedim(tokens, 0)[self._row.clamp(min=0)]  # (S, rows, ...)
        taken = taken.masked_fill(self._absent.reshape(*self._absent.shape, *[1] * (taken.dim() - 2)), padding)
        if packed.dim() == 4:  # views: (S, rows, M, H, D)
            return taken.permute(2, 0, 3, 1, 4)
        return taken.transpose(1, 2) if packed.dim() > 1 else taken

    def of_each_row(self, sums: Tensor | None) -> Tensor | None:
        """(T, Hq, ...) as (S, Hq, rows, ...)."""
        return None if sums is None else self.rows_of(sums, 0)

    def packed(self, results: Results) -> tuple[Tensor, Tensor, Tensor]:
        """Each (S, H, rows, ...) as (T, H, ...); 0 in rows of no sequence."""
        out, lse, mass = map(self._packed, results)
        return out, lse, mass

    def _packed(self, dense: Tensor) -> Tensor:
        if dense.shape[0] * dense.shape[2] == 0:
            return dense.new_zeros(self._rows, dense.shape[1], *dense.shape[3:])
        row = torch.arange(self._rows, device=dense.device)
        sequence = torch.searchsorted(self._ends, row, right=True)
        absent, sequence = sequence >= len(self._ends), sequence.clamp(max=len(self._ends) - 1)
        place = (row - self._ends[sequence] + self._most_rows).clamp(min=0, max=self._most_rows - 1)
        taken = dense.transpose(1, 2)[sequence, place]
        return taken.masked_fill(absent.reshape(-1, *[1] * (taken.dim() - 1)), 0)


def _check_lengths(op: str, rows: int, most: int, pages: Pages, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """What the operators check for themselves, wherever looking costs no wait. ``most``: the keys of a table."""
    offsets, lengths = pages.query_start_loc, pages.seq_lens
    count = offsets.diff()
    if len(lengths) > 0:
        checks.on_host(offsets[:1] != 0, f"{op}: query_start_loc: expected offsets from 0")
        checks.on_host(offsets > rows, f"{op}: query_start_loc: expected offsets to at most {rows}")
    checks.on_host(count < 0, f"{op}: query_start_loc: expected ascending offsets")
    checks.on_host(lengths < count, f"{op}: seq_lens: expected at least the queries of a sequence")
    checks.on_host(lengths > most, f"{op}: seq_lens: expected at most the {most} keys of a table")
    checks.on_host(count > max_seqlen_q, f"{op}: max_seqlen_q: expected at least the rows of every sequence")
    checks.on_host(lengths > max_seqlen_k, f"{op}: max_seqlen_k: expected at least the tokens of every sequence")


def _check_paged(
    op: str,
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[int, int]:
    """Raise unless these describe a paged call; (T, Hq)."""
    checks.tensor(op, "query", query)
    checks.dtype(op, "query", query, FLOATS)
    if query.dim() not in (3, 4):
        checks.rank(op, "query", query, 3, "(T, Hq, D) or (M, T, Hq, D)")
    tokens, heads, size = query.shape[-3:]
    checks.head_size(op, "query", size)
    _check_cache(op, kv_cache, query, size, "query")
    checks.multiple_of(op, heads, kv_cache.shape[1], "kv_cache")
    checks.tensor(op, "block_table", block_table)
    checks.rank(op, "block_table", block_table, 2, "(S, blocks of a sequence)")
    sequences = block_table.shape[0]
    _check_integers(op, "block_table", block_table, query, tuple(block_table.shape), "(S, blocks of a sequence)")
    _check_integers(op, "seq_lens", seq_lens, query, (sequences,), "(S,)")
    _check_integers(op, "query_start_loc", query_start_loc, query, (sequences + 1,), "(S + 1,)")
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if most is not None:
            checks.count(op, name, most)
    return tokens, heads


def _check_cache(op: str, kv_cache: Tensor, like: Tensor, head_size: int, name: str) -> None:
    checks.tensor(op, "kv_cache", kv_cache)
    checks.rank(op, "kv_cache", kv_cache, 4, "(blocks, Hkv, block size, C)")
    _check_same(op, "kv_cache", kv_cache, like, name)
    if kv_cache.shape[3] <= 2 * head_size:
        checks.mismatch(
            op, "kv_cache", "cells of key, value and modality", f"more than {2 * head_size}", kv_cache.shape[3]
        )


def _check_same(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {like_name} ({like.dtype}), got {tensor.dtype}")
    checks.device(op, name, tensor, like, like_name)


def _check_integers(
    op: str, name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], layout: str, like_name: str = "query"
) -> None:
    checks.tensor(op, name, tensor)
    checks.dtype(op, name, tensor, OFFSETS if name != "modality" and name != "query_modality" else INTEGERS)
    checks.device(op, name, tensor, like, like_name)
    checks.shape(op, name, tensor, shape, layout)


def _check_sums(
    op: str,
    query: Tensor,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    condition: Tensor | None,
    num_modalities: int,
) -> None:
    rows = query.shape[-3:-1]
    for name, tensor, shape, layout in (
        ("modality_bias", modality_bias, (*rows, num_modalities), "(T, Hq, M)"),
        ("condition", condition, (*rows, num_modalities), "(T, Hq, M)"),
        ("sink", sink, rows, "(T, Hq)"),
    ):
        if tensor is None:
            continue
        checks.tensor(op, name, tensor)
        checks.dtype(op, name, tensor, {query.dtype, accumulation_dtype(query.dtype)})
        checks.device(op, name, tensor, query)
        checks.broadcastable(op, name, tensor, shape, layout)
