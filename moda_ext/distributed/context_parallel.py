"""Duplex attention over a sequence that is spread over the ranks of a mesh. Public in ``moda_ext.distributed``.

Each scheme is exact: it computes what one process computes, up to the order of sums. They differ in what travels when,
and in what is kept for the backward pass (docs/distributed.md).

Alignment needs no keys from elsewhere. A causal Gram begins with that of the tokens before a chunk, and a fixed one is
that of all tokens: each rank sums over its own tokens, and the sums travel, (M, D, D) for a chunk and key head.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moda_ext._ops import autocast
from moda_ext.distributed.sequence import SequenceShards
from moda_ext.functional import checks
from moda_ext.functional.alignment import modality_gram
from moda_ext.functional.attention import Results, as_int32, check_attention, expand, modular_attention
from moda_ext.functional.gram import normalize_gram
from moda_ext.functional.parts import (
    Keys,
    Rows,
    Terms,
    attend_part,
    differentiate_part,
    finish_bias_gradient,
    merge,
)
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.attention import Tokens, align_and_attend
from moda_ext.nn.mask import ModularMask
from moda_ext.nn.states import GramState

__all__ = ["context_parallel_attention"]

OP = "context_parallel_attention"


class Call(NamedTuple):
    """What all rows of a call have in common. ``modality`` (B, N) in int32 is that of the whole sequence."""

    modality: Tensor
    num_modalities: int
    shards: SequenceShards
    is_causal: bool
    scale: float
    context: Tensor | None

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.modality.shape[1] // self.shards.num_chunks

    def own_chunks(self) -> Iterator[tuple[slice, slice]]:
        """Where each chunk of this rank is among its own tokens, and in the sequence."""
        for i, chunk in enumerate(self.shards.chunks):
            yield (
                slice(i * self.chunk, (i + 1) * self.chunk),
                slice(chunk * self.chunk, (chunk + 1) * self.chunk),
            )

    def blocks(self) -> list[tuple[slice, int]]:
        """Own rows, and how many tokens of the sequence they see, aligned at the end."""
        if self.is_causal:
            return [(own, of_all.stop) for own, of_all in self.own_chunks()]
        return [(slice(0, len(self.shards.chunks) * self.chunk), self.modality.shape[1])]

    def terms(self, bias: Tensor | None, sink: Tensor | None, own: slice, diagonal: bool = True) -> Terms:
        """Of own rows; ``diagonal``: over keys that the rows' own tokens end, where their sink is."""
        sink = _rows_of(sink, own) if diagonal else None
        return Terms(_rows_of(bias, own), sink, self.num_modalities, self.is_causal and diagonal, self.scale)


def context_parallel_attention(
    aligner: DuplexAligner | None,
    mask: ModularMask | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    num_modalities: int = 2,
    *,
    shards: SequenceShards,
    scheme: str = "regather",
    context: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    return_mass: bool = False,
) -> Results:
    r"""Duplex attention of this rank's tokens with the whole sequence: every rank of the mesh calls it at once.

    .. math::
        q^{(1..M)}, e = \text{aligner}(q, k), \qquad b, c = \text{mask}(q, e), \qquad
        \text{out}, \text{mass} = \text{modular\_attention}\big(q^{(1..M)}, k, v;\ b, c\big)

    over all N tokens, for the rows of this rank; exactly what :class:`moda_ext.attention.ModularDuplexAttention` does
    between its projections. Gradients of query, key and value are whole. Those of the aligner's and the mask's
    parameters are what this rank adds: **their sum over the ranks is the gradient**, as in data parallelism.

    Args:
        aligner, mask: the modules, or None. Any settings.
        query: (B, Hq, N / W, D), this rank's tokens in the order of ``shards``. float32, float64, bfloat16 or float16;
            D is a multiple of 8 from 8 to 256.
        key: (B, Hkv, N / W, D), like value, dtype and device of ``query``, after RoPE; Hq is a multiple of Hkv.
        modality: (B, N), integer: the modalities of the **whole** sequence in its own order, in [0, M), -1 for padding
            wherever it is; the same on every rank.
        num_modalities: M, 1 to 16.
        shards: who holds which tokens.
        scheme: what travels:

            - ``"regather"``: all keys and values, and again in the backward pass; nothing of the size of the whole
              sequence is kept;
            - ``"allgather"``: all keys and values, which are kept for the backward pass;
            - ``"ring"``: keys and values from rank to rank, and again in the backward pass; no rank ever has all;
            - ``"ulysses"``: queries, keys, values and results change from a part of the tokens to a part of the heads
              and back. Hq must be a multiple of W, and Hkv a multiple or a divisor of it.
        context: (B, N), boolean, the whole context of an aligner with ``scope="context"``.
        is_causal: whether a row sees no later tokens.
        scale: factor of the scores, by default D ** -0.5.
        return_mass: also return the attention mass.

    Returns:
        ``out`` (B, Hq, N / W, D) in the dtype of ``query``, or the tuple ``(out, mass)`` with mass (B, Hq, N / W, M) in
        float32 (float64 for float64), as :func:`moda_ext.attention.modular_attention` has them. Differentiable (once).

    Raises:
        ValueError: a shape, size or option does not fit; a length that cannot be cut, with the padding it wants.
        TypeError: an argument of another type or dtype.
        NotImplementedError: as ``modular_attention``.

    Under autocast, query, key and value are cast to the autocast dtype.

    Example:
        >>> shards = SequenceShards(init_device_mesh("cpu", (2,)))  # on two ranks
        >>> query, key, value = (shards.shard(x, 2) for x in (query, key, value))  # (B, H, N, D) to (B, H, N / 2, D)
        >>> out = context_parallel_attention(aligner, mask, query, key, value, modality, shards=shards)
    """
    query, key, value = autocast.cast_tokens(query, key, value)
    _check(aligner, mask, query, key, value, modality, num_modalities, shards, scheme, context, is_causal, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    call = Call(as_int32(modality), num_modalities, shards, is_causal, scale, context)
    if scheme == "ulysses":
        out, mass = _over_heads(aligner, mask, query, key, value, call, return_mass)
    else:
        views, bias, sink = _align(aligner, mask, query, key, call)
        attention = _SCHEMES[scheme](views, key, value, sink, call)
        if mask is None:
            out, mass = attention(bias)
        else:
            own = shards.shard(call.modality, 1)
            out, mass = mask.over_softmaxes(attention, query, own, bias)
    return (out, mass) if return_mass else out


# The alignment and the mask of own rows.


def _align(
    aligner: DuplexAligner | None, mask: ModularMask | None, query: Tensor, key: Tensor, call: Call
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Views, bias and sink of own rows, chunk by chunk: a chunk's tokens follow each other."""
    conditional = mask is not None and mask.conditional
    grams = [] if aligner is None else _grams(aligner, key, call)
    views, biases, sinks = [], [], []
    for i, (own, of_all) in enumerate(call.own_chunks()):
        rows, modality, indicator = query[:, :, own], call.modality[:, of_all], None
        view = rows
        if aligner is not None:
            view, *rest = _views(aligner, rows, key[:, :, own], modality, grams[i], conditional, of_all, call)
            indicator = rest[0] if rest else None
        bias, sink = None, None
        if mask is not None:
            start = (call.modality[:, : of_all.start] >= 0).sum(dim=1)
            bias, sink = mask(rows, modality, start=start, indicator=indicator)
        shape = rows.shape[:3]
        views.append(view)
        biases.append(expand(bias, (*shape, call.num_modalities), query.dtype))
        sinks.append(expand(sink, shape, query.dtype))
    return torch.cat(views, dim=-2), _join(biases), _join(sinks)


def _join(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim=2) if present else None


def _grams(aligner: DuplexAligner, key: Tensor, call: Call) -> list[Tensor]:
    """For each own chunk the raw Gram (B, Hkv, M, D, D) of the tokens before it; for a fixed Gram, that of all."""
    sums = [
        modality_gram(
            key[:, :, own],
            call.modality[:, of_all],
            call.num_modalities,
            include=None if call.context is None else call.context[:, of_all],
            key_norm=aligner.key_norm,
            normalize=None,
        )
        for own, of_all in call.own_chunks()
    ]
    every = call.shards.gather(torch.stack(sums), 0)  # by chunk
    if aligner.scope != "causal":
        return [every.sum(dim=0)] * len(sums)
    before = torch.cat([torch.zeros_like(every[:1]), every[:-1].cumsum(dim=0)])
    return [before[chunk] for chunk in call.shards.chunks]


def _views(
    aligner: DuplexAligner,
    query: Tensor,
    key: Tensor,
    modality: Tensor,
    gram: Tensor,
    return_indicator: bool,
    of_all: slice,
    call: Call,
) -> tuple[Tensor, ...]:
    if aligner.scope != "causal":
        gram = normalize_gram(gram, aligner.normalize)
        read = functools.partial(aligner.fixed_views, query, gram, return_indicator)
        include = None if call.context is None else call.context[:, of_all]
        return aligner(query, key, modality, modality, include=include, read=read)
    state = GramState(gram, key[:, :, :0], modality[:, :0], of_all.start, aligner.key_norm, 0)
    results = aligner(query, key, modality, modality, state, return_indicator=return_indicator)
    return results if isinstance(results, tuple) else (results,)


# Schemes that keep tokens where they are: from views, keys, values and sink to a function from a bias to (out, mass).

Attention = Callable[[Tensor | None], tuple[Tensor, Tensor]]


def _gathered_once(views: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, call: Call) -> Attention:
    all_keys, all_values = call.shards.gather(torch.stack([key, value]), 3).unbind(0)

    def attention(bias: Tensor | None) -> tuple[Tensor, Tensor]:
        results = [
            modular_attention(
                views[..., own, :],
                all_keys[:, :, :end],
                all_values[:, :, :end],
                call.modality[:, :end],
                num_modalities=call.num_modalities,
                modality_bias=None if bias is None else bias[:, :, own],
                sink=None if sink is None else sink[:, :, own],
                is_causal=call.is_causal,
                scale=call.scale,
                return_mass=True,
            )
            for own, end in call.blocks()
        ]
        out, mass = (torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
        return out, mass

    return attention


def _gathered_twice(views: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, call: Call) -> Attention:
    return lambda bias: _Regathered.apply(views, key, value, bias, sink, call)


def _around_the_ring(views: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, call: Call) -> Attention:
    return lambda bias: _Ring.apply(views, key, value, bias, sink, call)


_SCHEMES = {"regather": _gathered_twice, "allgather": _gathered_once, "ring": _around_the_ring}
SCHEMES = (*_SCHEMES, "ulysses")


class _Regathered(torch.autograd.Function):
    """Keys and values of all ranks, in the forward pass and again in the backward pass. Every call sees whole rows."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        keys, values = call.shards.collect(torch.stack([key, value]), 3)
        parts = []
        for own, end in call.blocks():
            seen = Keys(keys[:, :, :end], values[:, :, :end], call.modality[:, :end])
            terms = call.terms(bias, sink, own)
            parts.append(attend_part(query[..., own, :], seen, terms))
        rows = Rows(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))
        return _remember(ctx, query, key, value, bias, sink, rows, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, *rest = ctx.saved_tensors
        rows, call, needs = Rows(*rest), ctx.call, ctx.needs_input_grad[:5]
        shards, dtype = call.shards, rows.lse.dtype
        keys, values = shards.collect(torch.stack([key, value]), 3)
        sums = torch.zeros((2, *keys.shape), dtype=dtype, device=keys.device)  # float32 also for bfloat16 keys
        found = []
        for own, end in call.blocks():
            gradients = differentiate_part(
                _rows_of(grad_out, own),
                _rows_of(grad_mass, own),
                query[..., own, :],
                Keys(keys[:, :, :end], values[:, :, :end], call.modality[:, :end]),
                call.terms(bias, sink, own),
                rows.select(own),
                needs,
                whole_rows=True,
            )
            for total, gradient in zip(sums, (gradients.key, gradients.value), strict=True):
                if gradient is not None:
                    total[:, :, :end] += gradient
            found.append(gradients)
        grad_key = grad_value = None
        if needs[1] or needs[2]:
            grad_key, grad_value = shards.sum_of_parts(sums, 3).to(key.dtype)
        return (
            torch.cat([g.query for g in found if g.query is not None], dim=-2) if needs[0] else None,
            grad_key if needs[1] else None,
            grad_value if needs[2] else None,
            _join([g.modality_bias for g in found]),
            _join([g.sink for g in found]),
            None,
        )


class _Ring(torch.autograd.Function):
    """Keys and values go from rank to rank; the rows over each rank's keys are merged. In the backward pass they go
    around again, and behind them the gradients that they gather on their way home."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        found: dict[int, Rows] = {}  # by their first row
        for origin, (keys, values) in _travel(torch.stack([key, value]), call.shards):
            modality = call.shards.part_of(call.modality, 1, origin)
            for own, there, diagonal in _pairs(call, origin):
                seen = Keys(keys[:, :, there], values[:, :, there], modality[:, there])
                terms = call.terms(bias, sink, own, diagonal)
                part = attend_part(query[..., own, :], seen, terms)
                found[own.start] = merge(found[own.start], part) if own.start in found else part
        rows = Rows(*(torch.cat(parts, dim=2) for parts in zip(*(found[at] for at in sorted(found)), strict=True)))
        rows = rows._replace(out=rows.out.to(query.dtype))
        return _remember(ctx, query, key, value, bias, sink, rows, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, *rest = ctx.saved_tensors
        rows, call, needs = Rows(*rest), ctx.call, ctx.needs_input_grad[:5]
        dtype = rows.lse.dtype
        given = query, key, value, bias, sink
        grad_query, grad_key, grad_value, grad_bias, grad_sink = (
            torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) if need else None
            for tensor, need in zip(given, needs, strict=True)
        )
        travels = needs[1] or needs[2]
        behind: Tensor | None = None  # the gradients of the keys that are here, so far
        for origin, (keys, values) in _travel(torch.stack([key, value]), call.shards):
            modality = call.shards.part_of(call.modality, 1, origin)
            here: Sequence[Tensor | None] = (grad_key, grad_value)
            if travels and origin != call.shards.rank:
                behind = torch.zeros((2, *key.shape), dtype=dtype, device=key.device) if behind is None else behind
                here = behind.unbind(0)
            for own, there, diagonal in _pairs(call, origin):
                part = differentiate_part(
                    _rows_of(grad_out, own),
                    _rows_of(grad_mass, own),
                    query[..., own, :],
                    Keys(keys[:, :, there], values[:, :, there], modality[:, there]),
                    call.terms(bias, sink, own, diagonal),
                    rows.select(own),
                    needs,
                    whole_rows=False,
                )
                _add(None if grad_query is None else grad_query[..., own, :], part.query)
                _add(_rows_of(here[0], there), part.key)
                _add(_rows_of(here[1], there), part.value)
                _add(_rows_of(grad_bias, own), part.modality_bias)
                _add(_rows_of(grad_sink, own), part.sink)
            if behind is not None:
                behind = _finish(_send_on(behind, call.shards))
        for total, gradient in zip((grad_key, grad_value), () if behind is None else behind, strict=False):
            _add(total, gradient)
        if grad_bias is not None:
            grad_bias = finish_bias_gradient(grad_bias, grad_out, grad_mass, rows, sink)
        gradients = grad_query, grad_key, grad_value, grad_bias, grad_sink
        return *(g if g is None else g.to(t.dtype) for g, t in zip(gradients, given, strict=True)), None


def _remember(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    rows: Rows,
    call: Call,
) -> tuple[Tensor, Tensor]:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, sink, *rows)
    ctx.call = call
    return rows.out, rows.mass


def _rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[:, :, rows]


def _add(total: Tensor | None, part: Tensor | None) -> None:
    if total is not None and part is not None:
        total += part


def _pairs(call: Call, origin: int) -> Iterator[tuple[slice, slice, bool]]:
    """Own rows, keys among those of rank ``origin`` that they see, and whether these are the rows' own tokens: causal
    among themselves, and the part of the row that its sink is in."""
    shards, length = call.shards, call.chunk
    if not call.is_causal:
        everything = slice(0, length * len(shards.chunks))
        yield everything, everything, origin == shards.rank
        return
    for i, chunk in enumerate(shards.chunks):
        for j, other in enumerate(shards.chunks_of(origin)):
            if other <= chunk:
                yield (
                    slice(i * length, (i + 1) * length),
                    slice(j * length, (j + 1) * length),
                    other == chunk,
                )


def _travel(own: Tensor, shards: SequenceShards) -> Iterator[tuple[int, Tensor]]:
    """(rank, its ``own``) for every rank, this one first, each from the rank before while the last is used."""
    here = own
    for step in range(shards.size):
        sent = _send_on(here, shards) if step + 1 < shards.size else None
        yield (shards.rank - step) % shards.size, here
        if sent is not None:
            here = _finish(sent)


def _send_on(tensor: Tensor, shards: SequenceShards) -> tuple[Tensor, list[dist.Work], Tensor]:
    """Begins to send to the next rank, and to receive from the one before."""
    group, tensor = shards.mesh.get_group(), tensor.contiguous()
    received = torch.empty_like(tensor)
    following, previous = ((shards.rank + d) % shards.size for d in (1, -1))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=following),
            dist.P2POp(dist.irecv, received, group=group, group_peer=previous),
        ]
    )
    return received, works, tensor  # which lives until it is sent


def _finish(sent: tuple[Tensor, list[dist.Work], Tensor]) -> Tensor:
    received, works, _ = sent
    for work in works:
        work.wait()
    return received


# All tokens of some heads.


def _over_heads(
    aligner: DuplexAligner | None,
    mask: ModularMask | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    return_mass: bool,
) -> tuple[Tensor, Tensor]:
    """The scheme of DeepSpeed-Ulysses: every rank has all tokens of its heads while they attend."""
    shards = call.shards
    if key.shape[1] % shards.size:  # fewer key heads than ranks: some ranks have the same
        key, value = (x.repeat_interleave(shards.size // key.shape[1], dim=1) for x in (key, value))
    query, key, value = (_to_heads(x, shards) for x in (query, key, value))
    tokens = Tokens(query, key, value, call.modality, call.modality, key, call.modality, call.scale)

    def attend(mask: ModularMask | None) -> tuple[Tensor, Tensor]:
        got = align_and_attend(
            aligner, mask, tokens, call.num_modalities, context=call.context, is_causal=call.is_causal
        )
        return got.out, got.mass

    if mask is None:
        out, mass = attend(None)
    else:
        count = query.shape[1]
        heads = slice(shards.rank * count, (shards.rank + 1) * count)
        part = functools.partial(_heads_of, mask, heads, shards.size * count)
        out, mass = mask(query, call.modality, read=lambda: attend(part()))
    return _to_tokens(out, shards), _to_tokens(mass, shards) if return_mass else mass


def _to_heads(x: Tensor, shards: SequenceShards) -> Tensor:
    """(B, H, N / W, D) of own tokens to (B, H / W, N, D) of own heads."""
    by_rank = x.unflatten(1, (shards.size, -1)).movedim(1, 0)
    return shards.in_order(shards.exchange(by_rank), 2)


def _to_tokens(x: Tensor, shards: SequenceShards) -> Tensor:
    """(B, H / W, N, D) of own heads to (B, H, N / W, D) of own tokens."""
    return shards.exchange(shards.by_rank(x, 2)).movedim(0, 1).flatten(1, 2)


def _heads_of(mask: ModularMask, heads: slice, num_heads: int) -> ModularMask:
    """The mask of some heads, whose tensors are slices of this one's.

    A plain one without hooks, also where wrappers have changed the class of ``mask``: its own have run.

    Raises:
        ValueError: the mask is not that of ``num_heads`` heads.
    """
    rows = {mask.num_heads, *(len(t) for t in (*mask.parameters(), *mask.buffers()))}
    if rows != {num_heads}:
        raise ValueError(
            f"{OP}: scheme 'ulysses' cuts the heads of the mask, which must be those of query, {num_heads}, got "
            f"{sorted(rows)}; where heads are cut already (tensor parallel), use 'regather'"
        )
    part = ModularMask.__new__(ModularMask)
    vars(part).update(vars(mask))
    for name, value in vars(mask).items():
        if name in ("_parameters", "_buffers"):
            vars(part)[name] = {n: None if t is None else t[heads] for n, t in value.items()}
        elif name.endswith("_hooks") and isinstance(value, dict):
            vars(part)[name] = OrderedDict()
    part.num_heads = heads.stop - heads.start
    return part


def _check(
    aligner: DuplexAligner | None,
    mask: ModularMask | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    num_modalities: int,
    shards: SequenceShards,
    scheme: str,
    context: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> None:
    if not isinstance(shards, SequenceShards):
        raise TypeError(f"{OP}: shards must be a SequenceShards, got {type(shards).__name__}")
    if scheme not in SCHEMES:
        raise ValueError(f"{OP}: scheme must be one of {SCHEMES}, got {scheme!r}")
    for name, tensor, layout in (("query", query, "(B, Hq, N / W, D)"), ("modality", modality, "(B, N)")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{OP}: {name} must have shape {layout}, got {tuple(tensor.shape)}")
    expected = query.shape[0], query.shape[2] * shards.size
    if modality.shape != expected:
        raise ValueError(
            f"{OP}: modality must have shape {expected}, that of the whole sequence, of which each of {shards.size} "
            f"ranks has {query.shape[2]} tokens, got {tuple(modality.shape)}"
        )
    shards.check_length(OP, "modality", modality.shape[1])
    own = shards.shard(modality, 1)
    check_attention(query, key, value, own, None, None, num_modalities, is_causal, scale, OP)
    # On every rank: an operator would find it on the ranks alone that see such a key, while the others wait.
    strange = (modality < -1) | (modality >= num_modalities)
    checks.on_host(strange, f"{OP}: modality must hold -1 for padding, or 0 to {num_modalities - 1}")
    for name, module in (("aligner", aligner), ("mask", mask)):
        if module is not None and module.num_modalities != num_modalities:
            raise ValueError(
                f"{OP}: num_modalities must be that of the {name}, {module.num_modalities}, got {num_modalities}"
            )
    _check_scope(aligner, mask, modality, context, is_causal)
    heads, kv_heads, size = query.shape[1], key.shape[1], shards.size
    if scheme == "ulysses" and (heads % size or (kv_heads % size and size % kv_heads)):
        raise ValueError(
            f"{OP}: scheme 'ulysses' needs query heads that are a multiple of the {size} ranks, and key heads that are "
            f"a multiple or a divisor of it, got {heads} and {kv_heads}; use 'regather'"
        )


def _check_scope(
    aligner: DuplexAligner | None, mask: ModularMask | None, modality: Tensor, context: Tensor | None, is_causal: bool
) -> None:
    if mask is not None and mask.conditional and aligner is None:
        raise ValueError(
            f"{OP}: mask variant {mask.variant!r} is conditioned on the aligner's Gram; give an aligner, or a mask of "
            "variant 'fix'"
        )
    scope = None if aligner is None else aligner.scope
    if scope == "full" and is_causal:
        raise ValueError(f"{OP}: aligner scope 'full' in causal attention would show every token the later ones")
    if (context is not None) != (scope == "context"):
        raise ValueError(f"{OP}: context belongs to an aligner with scope='context', got scope={scope!r}")
    if context is not None:
        if not isinstance(context, Tensor) or context.dtype != torch.bool:
            raise TypeError(f"{OP}: context must be a boolean tensor, got {getattr(context, 'dtype', type(context))}")
        if context.shape != modality.shape:
            raise ValueError(f"{OP}: context must have shape {tuple(modality.shape)}, got {tuple(context.shape)}")
