r"""Modular attention on PyTorch's FlexAttention: one call for each key modality, merged.

Within one modality the softmax does not feel the bias, so for each m one call over the keys of m gives :math:`o^{(m)}`
and :math:`\ell_m = \log \sum_{j: a_j = m} e^{s_{ij}}`, and then

.. math::
    z_m = \ell_m + b_m, \quad L = \log\Big(\sum_m e^{z_m} + e^c\Big), \quad \text{mass}_m = e^{z_m - L}, \quad
    o = \sum_m \text{mass}_m\, o^{(m)}

(docs/mathematics.md section 3). PyTorch differentiates the merge, so bias, sink, lse and mass have their gradients and
no call has captured buffers that want one. Blocks of 128 x 128 pairs without a key of the modality cost nothing: on
runs of modalities the M calls do about the work of one.

What a row sees are the keys of an interval, minus those of other modalities: all keys, a causal prefix, or those of its
sequence among packed ones. So the blocks of a call follow from the ids and two numbers for each row, in O((N / 128)^2).
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from moda_ext.functional import checks

BLOCK = 128
LEAST_HEAD_SIZE = 16  # of FlexAttention's kernels on GPUs
DECODED = 32  # rows for a key head that FlexAttention's kernel for few rows gets; with more it spills
KEPT = 4  # sets of blocks: those of the last ids, which the layers of a model have in common


class Blocks(NamedTuple):
    """What the calls look at, for each modality: the mask of blocks, and (B, Nq), bool: which rows see a key of it."""

    masks: list[Any]  # of torch.nn.attention.flex_attention.BlockMask
    seen: list[Tensor]


def modular_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    *,
    num_modalities: int,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass of :func:`moda_ext.attention.modular_attention`."""
    rows, columns = query.shape[-2], key.shape[-2]

    def make() -> Blocks:
        _check_on_host("modular_attention", key_modality, num_modalities)
        return make_blocks(key_modality, *_dense_intervals(rows, columns, is_causal, query.device), num_modalities)

    blocks = _kept_blocks(make, (key_modality,), (rows, columns, num_modalities, is_causal))
    return _attend(query, key, value, key_modality, blocks, modality_bias, sink, scale)


def modular_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_modality: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    num_modalities: int,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and mass of :func:`moda_ext.attention.modular_attention_varlen`: one sequence to FlexAttention."""
    rows, columns = query.shape[-3], key.shape[-3]
    ids, sequences = key_modality[None], (cu_seqlens_q, cu_seqlens_k)

    def make() -> Blocks:
        offsets = {"cu_seqlens_q": (cu_seqlens_q, rows), "cu_seqlens_k": (cu_seqlens_k, columns)}
        _check_on_host("modular_attention_varlen", key_modality, num_modalities, offsets)
        return make_blocks(ids, *_packed_intervals(rows, *sequences, is_causal), num_modalities)

    blocks = _kept_blocks(make, (key_modality, *sequences), (rows, columns, num_modalities, is_causal))
    query, key, value = (t.transpose(-2, -3).unsqueeze(-4) for t in (query, key, value))
    bias = None if modality_bias is None else modality_bias.expand(rows, query.shape[-3], num_modalities)
    bias = None if bias is None else bias.transpose(0, 1)[None]
    sink = None if sink is None else sink.expand(rows, query.shape[-3]).T[None]
    out, lse, mass = _attend(query, key, value, ids, blocks, bias, sink, scale)
    return out[0].transpose(0, 1), lse[0].T, mass[0].transpose(0, 1)


def _check_on_host(
    op: str, ids: Tensor, num_modalities: int, offsets: Mapping[str, tuple[Tensor, int]] | None = None
) -> None:
    """What the kernels of the CPU refuse. ``offsets``: of packed sequences, each with the number that it ends at."""
    if not ids.is_cpu:  # reading would wait for the device
        return
    checks.ids(op, "key_modality", ids, num_modalities)
    for name, (cu_seqlens, tokens) in (offsets or {}).items():
        wrong = torch.cat([cu_seqlens[:1] != 0, cu_seqlens[-1:] != tokens, cu_seqlens.diff() < 0])
        checks.on_host(wrong, f"{op}: {name}: expected offsets that rise from 0 to {tokens}")


def make_blocks(ids: Tensor, first: Tensor, last: Tensor, num_modalities: int) -> Blocks:
    """The blocks of every modality.

    Args:
        ids: (B, Nk), integer; outside [0, M) are keys that nobody sees.
        first, last: (Nq,), integer: row i sees the keys first_i <= j <= last_i, none if last_i = first_i - 1. Neither
            of them falls from row to row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns, device = len(first), ids.shape[1], ids.device
    top = torch.arange(0, rows, BLOCK, device=device)
    left = torch.arange(0, columns, BLOCK, device=device)
    bottom, right = (top + BLOCK).clamp(max=rows) - 1, (left + BLOCK).clamp(max=columns)
    # Of a block of keys: the part that some row of a block of rows sees, and whether all of them see all of it.
    first_of_top, first_of_bottom = (first.index_select(0, i)[:, None] for i in (top, bottom))
    last_of_top, last_of_bottom = (last.index_select(0, i)[:, None] for i in (top, bottom))
    begin = torch.maximum(first_of_top, left)
    end = torch.minimum(last_of_bottom + 1, right)
    whole = (first_of_bottom <= left) & (last_of_top + 1 >= right)
    whole = whole & (top + BLOCK <= rows)[:, None] & (left + BLOCK <= columns)
    masks, seen = [], []
    for m in range(num_modalities):
        member = ids == m
        among_first = pad(member.cumsum(dim=1), (1, 0))  # entry n: members among the first n keys

        def before(n: Tensor, counts: Tensor = among_first) -> Tensor:
            return counts.index_select(1, n.clamp(0, columns).flatten()).unflatten(1, n.shape)

        some = (end > begin) & (before(end) > before(begin))
        full = whole & (before(right) - before(left) == BLOCK)[:, None]
        masks.append(
            BlockMask.from_kv_blocks(
                *_listed(some & ~full),
                *_listed(full),
                BLOCK_SIZE=BLOCK,
                mask_mod=_pairs(member, first, last),
                seq_lengths=(rows, columns),
            )
        )
        seen.append(before(last + 1) > before(first))
    return Blocks(masks, seen)


def _pairs(member: Tensor, first: Tensor, last: Tensor) -> Callable:
    """One int32 for each key, its place or one beyond all: with a bool to load, Triton's kernel spills 5 KB."""
    place = torch.arange(member.shape[1], device=member.device)
    place = torch.where(member, place, torch.iinfo(torch.int32).max).to(torch.int32)
    first, last = first.to(torch.int32), last.to(torch.int32)

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        at = place[batch, column]
        return (at >= first[row]) & (at <= last[row])

    return mask_mod


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, R, C), bool -> how many blocks each row of blocks has, (B, 1, R), and which come first, (B, 1, R, C)."""
    blocks = blocks[:, None].to(torch.int32)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def _dense_intervals(rows: int, columns: int, is_causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows, device=device)
    last = (row + (columns - rows)).clamp(min=-1) if is_causal else torch.full_like(row, columns - 1)
    return torch.zeros_like(row), last


def _packed_intervals(rows: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows, device=cu_seqlens_q.device)
    sequence = torch.searchsorted(cu_seqlens_q, row, right=True) - 1
    sequence = sequence.clamp(0, len(cu_seqlens_q) - 2)  # offsets that lie are no reason to read elsewhere
    first, after = cu_seqlens_k.long()[sequence], cu_seqlens_k.long()[sequence + 1]
    last = torch.maximum(after - (cu_seqlens_q.long()[sequence + 1] - row), first - 1) if is_causal else after - 1
    return first, last


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor,
    blocks: Blocks,
    modality_bias: Tensor | None,
    sink: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    present = (ids >= 0)[:, None, :, None]  # what padding holds must not meet a probability of 0
    key, value = torch.where(present, key, 0.0), torch.where(present, value, 0.0)
    head_size = query.shape[-1]
    scale = head_size**-0.5 if scale is None else float(scale)
    if head_size < LEAST_HEAD_SIZE:
        query, key, value = (pad(t, (0, LEAST_HEAD_SIZE - head_size)) for t in (query, key, value))
    outs, sums = [], []
    for m, (mask, seen) in enumerate(zip(*blocks, strict=True)):
        view = query[m] if query.dim() == 5 else query
        out, lse = _flex_attention(view, key, value, mask, scale)
        outs.append(torch.where(seen[:, None, :, None], out[..., :head_size], 0.0))
        sums.append(torch.where(seen[:, None], lse, -torch.inf))
    lse, mass = _merge(torch.stack(sums, dim=-1), modality_bias, sink)
    merged = mass[..., 0, None] * outs[0]
    for m, out in enumerate(outs[1:], start=1):
        merged = merged + mass[..., m, None] * out
    return merged.to(query.dtype), lse, mass


def _merge(sums: Tensor, modality_bias: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse and mass. Relative to the largest number of a row, so that one that all have in common costs no digits."""
    bias = torch.zeros_like(sums) if modality_bias is None else modality_bias.to(sums.dtype).expand_as(sums)
    sink = sums.new_full((), -torch.inf) if sink is None else sink.to(sums.dtype)
    sink = sink.expand(sums.shape[:-1])
    # The bias of what a row does not see has no part in it, and may be too large for a difference.
    bias = torch.where(sums > -torch.inf, bias, -torch.inf)
    with torch.no_grad():
        base = torch.maximum(bias.amax(dim=-1), sink)
        base = torch.where(base > -torch.inf, base, 0.0)
    bias, sink = bias - base[..., None], sink - base
    scores = sums + bias
    with torch.no_grad():
        largest = torch.maximum(scores.amax(dim=-1), sink)
        largest = torch.where(largest > -torch.inf, largest, 0.0)
    weights, rest = (scores - largest[..., None]).exp(), (sink - largest).exp()
    total = weights.sum(dim=-1) + rest
    some = total > 0
    total = torch.where(some, total, 1.0)
    lse = torch.where(some, base + (largest + total.log()), -torch.inf)
    return lse, weights / total[..., None]


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    few = query.shape[2] * (query.shape[1] // key.shape[1]) <= DECODED
    if torch.compiler.is_compiling() or query.device.type == "cpu":
        return _flex_attention_with(scale, few)(query, key, value, mask)
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    form = query.shape[1], key.shape[1], query.shape[3], query.dtype, gradients
    return _compiled(scale, few, form)(query, key, value, mask)


@functools.cache
def _compiled(scale: float, few: bool, form: tuple) -> Callable:
    """FlexAttention as a kernel, for calls of one form; uncompiled it makes the matrix of all pairs.

    torch.compile takes what differs between two calls of one function for dynamic, and of those only lengths and
    batches may be: with a scale or a head size that it does not know there is no kernel. It knows a function by its
    code, so each form has one of its own.
    """
    attend = _flex_attention_with(scale, few)
    name = "_".join(map(str, ("attend", *form, scale, few))).replace(".", "_")
    attend.__code__ = attend.__code__.replace(co_name=name)
    # Too many kinds of strides and masks must be an error, and never the matrix of all pairs.
    limit = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(attend, fullgraph=True, **limit)  # type: ignore[call-overload]


def _flex_attention_with(scale: float, few: bool) -> Callable:
    """``few``: rows for a key head. Left to itself FlexAttention takes its kernel for few rows up to 127 of each query
    head, and refuses where those of a key head do not fit into a block."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        out, aux = flex_attention(
            query,
            key,
            value,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options=None if few or query.device.type == "cpu" else {"BACKEND": "TRITON"},
        )
        return out, aux.lse  # type: ignore[return-value]  # asked for

    return attend


class _Kept(NamedTuple):
    tensors: list[weakref.ref]
    state: tuple
    blocks: Blocks


_kept: list[_Kept] = []


def _kept_blocks(make: Callable[[], Blocks], tensors: tuple[Tensor, ...], options: tuple) -> Blocks:
    """``make()``, or what it made for these very tensors (unchanged since), options and stream."""
    if not _may_keep(tensors):
        return make()
    first = tensors[0]
    stream = 0 if first.is_cpu else torch.accelerator.current_stream(first.device).stream_id
    memory = [(t._version, t.data_ptr(), t.shape, t.stride()) for t in tensors]
    state = (options, stream, memory)
    for kept in _kept:
        if kept.state == state and all(reference() is t for reference, t in zip(kept.tensors, tensors, strict=True)):
            return kept.blocks
    with torch.inference_mode(False):  # a training step may want them next
        blocks = make()
    _kept.insert(0, _Kept([weakref.ref(t) for t in tensors], state, blocks))
    del _kept[KEPT:]
    return blocks


def _may_keep(tensors: tuple[Tensor, ...]) -> bool:
    """Not what is traced or captured, where blocks belong to the graph, and not where tensors have no versions."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not any(t.is_inference() for t in tensors)
