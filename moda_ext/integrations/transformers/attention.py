"""The attention function "moda", its mask function, and the module with a layer's MODA parameters.

Data of one call: the hooks of ``hooks.py`` give every layer a :class:`ModalityContext`; :func:`moda_attention` brings
keys and modalities to the form of the operators and calls the layer's :class:`MODAAttention`, or plain attention. A
text stack has hooks if and only if its config has settings (``config.moda``); without both, "moda" is ``sdpa``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from moda_ext import reference
from moda_ext._ops.limits import accumulation_dtype
from moda_ext.functional.attention import modular_attention
from moda_ext.integrations.recording import AttentionRecord
from moda_ext.integrations.settings import PSEUDO_SCORES_ARE_OFF, MODAConfig
from moda_ext.integrations.transformers.cache import (
    MODADynamicLayer,
    MODADynamicSlidingWindowLayer,
    MODALayerMixin,
    MODAStaticLayer,
)
from moda_ext.integrations.transformers.engines import sharded_like
from moda_ext.integrations.transformers.parts import SelfAttention
from moda_ext.integrations.transformers.versions import versions
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.attention import Tokens, align_and_attend
from moda_ext.nn.guards import refuse_split_heads
from moda_ext.nn.layer import DuplexLayer, on_own_heads
from moda_ext.nn.mask import ModularMask
from moda_ext.nn.states import GramState
from moda_ext.release import ReleaseAligner

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moda_ext.distributed.sequence import SequenceShards

__all__ = ["ContextParallel", "MODAAttention", "ModalityContext"]

NAME = "moda"


class ContextParallel(NamedTuple):
    """Which ranks hold which tokens of one sequence, and how their attention comes together."""

    shards: SequenceShards
    scheme: str


class ModalityContext(NamedTuple):
    """What the layers of one forward pass know of the tokens; with ``parallel``, of those of all ranks."""

    query_modality: Tensor  # (B, Nq), int32, -1 for padding
    key_modality: Tensor  # (B, tokens seen), or (B, max_cache_len) of a static cache
    start: int | Tensor  # tokens before the new ones
    num_modalities: int
    cache: Cache | None
    masked: bool = False  # a mask came to the text stack
    parallel: ContextParallel | None = None


class PlainlyRecorded(TypedDict):
    """What an :class:`~moda_ext.integrations.recording.AttentionRecord` has of the attention itself."""

    mass: Tensor
    lse: Tensor | None
    query: Tensor
    key: Tensor


class Recorded(PlainlyRecorded, total=False):
    """The same of a layer with MODA."""

    bias: Tensor | None


class MODAAttention(DuplexLayer):
    """What a layer's attention has of MODA: the aligner and the mask, ``self_attn.moda``.

    Args:
        config: the settings.
        num_heads: Hq.
        head_dim: D.
    """

    def __init__(self, config: MODAConfig, num_heads: int, head_dim: int):
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        self.aligner: DuplexAligner | ReleaseAligner | None = None
        self.mask: ModularMask | None = None
        with torch.device("cpu"):  # also where a model is made on the meta device: the mask checks its values
            if config.mode == "release":
                self.aligner = ReleaseAligner(head_dim)
            else:
                self.aligner = config.make_aligner(head_dim)
            self.mask = config.make_mask(num_heads)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.mask is not None and self.mask.is_off_unlike(state_dict, f"{prefix}mask."):
            raise ValueError(f"load_state_dict: {PSEUDO_SCORES_ARE_OFF}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_parameters(self) -> None:
        """The values of a new module, except in tensors that a checkpoint has filled."""
        fresh = MODAAttention(self.config, self.num_heads, self.head_dim).state_dict()
        for name, tensor in self.state_dict(keep_vars=True).items():
            init.copy_(tensor, sharded_like(fresh[name], tensor))

    @on_own_heads
    def forward(
        self,
        tokens: Tokens,
        visible: Tensor | None,
        state: GramState | None,
        keep_state: bool,
        start: Tensor | int,
        record: bool,
        parallel: ContextParallel | None = None,
    ) -> tuple[Tensor, GramState | None, Recorded | None]:
        """One attention call.

        Args:
            tokens: the queries, keys and modalities, ``new_key`` those of the query's tokens.
            visible: a mask of the model's own, instead of causal attention.
            state: the Gram of the tokens before, or None: then it is made of all keys in ``tokens``.
            keep_state: also make the Gram after this call.
            start: (B,) or a number, how many tokens came before without padding.
            record: also return what a recorder gets.
            parallel: ``tokens`` are this rank's, with the modalities of all; no cache, no mask, nothing recorded.

        Returns:
            ``(out (B, Hq, Nq, D), state or None, what is recorded or None)``, the latter as keyword arguments of
            :class:`~moda_ext.integrations.recording.AttentionRecord`.
        """
        aligner = self.aligner
        if parallel is not None:
            if isinstance(aligner, ReleaseAligner):
                raise NotImplementedError(
                    "context_parallel: mode='release' aligns a prompt as a whole, which is on one rank only"
                )
            return attend_in_parallel(aligner, self.mask, tokens, self.config.num_modalities, parallel), None, None
        if isinstance(aligner, ReleaseAligner):
            if tokens.key.shape[2] != tokens.query.shape[2] > 1:
                raise NotImplementedError(
                    "mode='release' aligns a prompt as a whole, and decodes one token at a time: pass the prompt in "
                    "one piece, without drafts"
                )
            if tokens.key.shape[2] == tokens.query.shape[2]:  # as in the release: only where there is no past
                tokens = tokens._replace(key=aligner(tokens.key, tokens.value, tokens.key_modality))
            aligner = None
        elif state is None:
            tokens = tokens._replace(new_key=tokens.key, new_modality=tokens.key_modality)
        if visible is not None and self.mask is not None and self.mask.softmax == "split":
            raise NotImplementedError(
                "mask softmax='split' runs in layers with plain causal attention only, and this model made a mask "
                "of its own (bidirectional images, packed sequences or a sliding window); use softmax='joint'"
            )
        out, lse, mass, views, bias, state = align_and_attend(
            aligner,
            self.mask,
            tokens,
            self.config.num_modalities,
            gram=state,
            keep_gram=keep_state,
            start=start,
            return_terms=record,
            attention=attention_under(visible),
        )
        recorded: Recorded | None = None
        if record:
            assert views is not None, "asked for by return_terms"
            recorded = {"mass": mass, "lse": lse, "query": views, "key": tokens.key, "bias": bias}
        return out, state, recorded

    @property
    def whole_heads(self) -> int:
        return self.num_heads

    def extra_repr(self) -> str:
        return f"modalities={self.config.modalities}, mode={self.config.mode!r}"


def attend_in_parallel(
    aligner: DuplexAligner | None,
    mask: ModularMask | None,
    tokens: Tokens,
    num_modalities: int,
    parallel: ContextParallel,
) -> Tensor:
    """Attention of this rank's tokens, (B, Hq, N / W, D)."""
    from moda_ext.distributed.context_parallel import context_parallel_attention  # needs a torch with distributed

    out: Tensor = context_parallel_attention(
        aligner,
        mask,
        tokens.query,
        tokens.key,
        tokens.value,
        tokens.query_modality,
        num_modalities,
        shards=parallel.shards,
        scheme=parallel.scheme,
        scale=tokens.scale,
    )
    return out


def attention_under(visible: Tensor | None) -> Callable:
    """``modular_attention``, or the same by N x N scores under a mask of the model's own."""
    if visible is None:
        return modular_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_modality: Tensor,
        *,
        is_causal: bool,
        return_lse: bool,
        return_mass: bool,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(query.dtype)
        arguments = *(t.to(dtype) for t in (query, key, value)), key_modality.long()
        with torch.autocast(query.device.type, enabled=False):
            out, lse, mass = reference.dense_attention(*arguments, **options, visible=visible)
        return out.to(value.dtype), lse, mass

    return attention


# What ``sdpa`` takes and is served here, and what it or another attention function takes and would be ignored.
SERVED = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "kwargs"}
REFUSED = frozenset(inspect.signature(sdpa_attention_forward).parameters) - SERVED | {
    *("softcap", "s_aux", "position_bias"),
    *("block_table", "read_index", "write_index"),  # of continuous batching
}


def moda_attention(
    module: SelfAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    modality_context: ModalityContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "moda" of Transformers' ``AttentionInterface``.

    In a layer with ``module.moda`` modular attention; in one without, plain attention equal to ``sdpa``. With
    ``module.moda_recorder`` set, the recorder gets an :class:`~moda_ext.integrations.recording.AttentionRecord`.

    Raises:
        RuntimeError: the keys, the cache or the modalities are not those of one pass: a Transformers that works in
            another way than those this was tested with.
        NotImplementedError: an option of attention that this one lacks.
    """
    moda, recorder = getattr(module, "moda", None), getattr(module, "moda_recorder", None)
    if modality_context is None:
        if _has_settings(getattr(module, "config", None)):
            raise RuntimeError(
                "attention 'moda' has settings (text_config.moda), and nothing derives the modalities of the tokens. "
                "Call apply_moda(model) on the ...ForConditionalGeneration model, which takes the settings from the "
                f"config {versions()}"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _check_heads(module, query, key)
    if modality_context.parallel is not None:
        return _moda_in_parallel(module, query, key, value, attention_mask, modality_context, kwargs), None
    cached = _check_premises(module, query, key, modality_context, kwargs)
    if attention_mask is not None and attention_mask.dim() == 2 and not modality_context.masked:
        _fail("a mask of padding came to the attention that did not come to the text stack")
    own_mask = attention_mask is not None and attention_mask.dim() == 4
    if moda is None and recorder is None and (kwargs.get("sliding_window") is not None or own_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _check_options(module, own_mask, kwargs)
    if isinstance(cached, StaticSlidingWindowLayer):
        raise NotImplementedError("a layer with a static sliding-window cache cannot be recorded; use a dynamic cache")

    mask = attention_mask if own_mask else None
    tokens, visible = _tokens(query, key, value, mask, kwargs.get("scaling"), modality_context)
    if moda is None:
        attention = attention_under(visible)
        attended = align_and_attend(None, None, tokens, modality_context.num_modalities, attention=attention)
        out, lse, mass = attended.out, attended.lse, attended.mass
        recorded: Recorded | None = {"mass": mass, "lse": lse, "query": tokens.query, "key": tokens.key}
    else:
        if cached is not None and not isinstance(cached, MODALayerMixin):
            _fail(f"the cache has a layer of {type(cached).__name__}")
        out, recorded = _duplex_attention(moda, tokens, visible, key, modality_context, cached, recorder is not None)
    if recorder is not None:
        assert recorded is not None, "asked for by the recorder"
        recorder(
            AttentionRecord(
                layer=module.layer_idx,
                query_modality=tokens.query_modality,
                key_modality=tokens.key_modality,
                scale=tokens.scale,
                visible=visible,
                mesh=_head_mesh(module),
                **recorded,
            )
        )
    return out.transpose(1, 2).contiguous(), None


def _moda_in_parallel(
    module: SelfAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: ModalityContext,
    kwargs: dict,
) -> Tensor:
    """:func:`moda_attention` of this rank's tokens of a sequence."""
    parallel = context.parallel
    assert parallel is not None, "called where there is"
    if getattr(module, "moda_recorder", None) is not None:
        raise NotImplementedError("context_parallel: a rank sees a part of the rows and cannot be recorded")
    if kwargs.get("sliding_window") is not None or (attention_mask is not None and attention_mask.dim() != 2):
        raise NotImplementedError(
            "context_parallel: plain causal attention only, and this layer has a sliding window or a mask of its own "
            "(bidirectional images, packed sequences, a mask of pairs)"
        )
    _check_options(module, False, kwargs)
    own, every = query.shape[2], context.query_modality.shape[1]
    if own * parallel.shards.size != every or key.shape[2] != own:
        _fail(f"{own} queries and {key.shape[2]} keys came on each of {parallel.shards.size} ranks, of {every} tokens")
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    modality = context.query_modality.to(query.device)
    tokens = Tokens(query, key, value, modality, modality, key, modality, scale)
    moda = getattr(module, "moda", None)
    if moda is None:
        out = attend_in_parallel(None, None, tokens, context.num_modalities, parallel)
    else:
        out, _, _ = moda(tokens, None, None, False, 0, False, parallel)
    return out.transpose(1, 2).contiguous()


def _duplex_attention(
    moda: MODAAttention,
    tokens: Tokens,
    visible: Tensor | None,
    key: Tensor,
    context: ModalityContext,
    cached: MODALayerMixin | None,
    record: bool,
) -> tuple[Tensor, Recorded | None]:
    """``(out, what is recorded or None)`` of a layer with MODA, whose Gram goes on in the cache layer."""
    aligner = moda.aligner if isinstance(moda.aligner, DuplexAligner) else None
    aligns = aligner is not None
    counts = moda.mask is not None and moda.mask.length is not None and moda.mask.has_base
    if visible is not None and (aligns or counts):
        _check_past_is_visible(tokens, visible, context.start, aligns)
    state = None
    if cached is not None and aligner is not None:
        state = cached.gram
        if isinstance(cached, MODAStaticLayer) and (state is None or cached.gram_is_stale):
            state = _static_gram(aligner, key, context)
        elif isinstance(cached, MODADynamicLayer) and state is not None and state.length != context.start:
            _fail(f"the Gram of the cache is over {state.length} tokens, and {context.start} came before this pass")
    start: Tensor | int = 0
    if moda.mask is not None and moda.mask.length is not None:  # pseudo scores that end somewhere
        seen = context.key_modality >= 0
        start = seen.sum(dim=1).to(tokens.query.device) - (tokens.query_modality >= 0).sum(dim=1)
    out, state, recorded = moda(tokens, visible, state, cached is not None and aligns, start, record)
    if isinstance(cached, MODAStaticLayer) and state is not None:
        cached.store(state.detach())  # in place
    elif state is not None and cached is not None:
        cached.gram = state  # with its history, which the keys in the cache keep too
    return out, recorded


def _static_gram(aligner: DuplexAligner, key: Tensor, context: ModalityContext) -> GramState:
    """The Gram of the tokens before this pass, from the keys (B, Hkv, max_cache_len, D) of a static cache."""
    past = 0 if not isinstance(context.start, Tensor) else key.shape[2]  # a number: the first pass
    modality = context.key_modality.to(key.device)[:, :past]
    before = torch.arange(past, device=key.device) < context.start
    return GramState.from_keys(
        key[:, :, :past],
        modality.masked_fill(~before, -1),
        context.num_modalities,
        key_norm=aligner.key_norm,
        window=0,
    )


def _head_mesh(module: SelfAttention) -> DeviceMesh | None:
    """The mesh over which a layer's heads are split, if it is known: MODA layers do, others while they are recorded."""
    split = getattr(getattr(module, "moda", None), "head_split", None)
    return getattr(module, "moda_head_mesh", None) if split is None else split.mesh


def _check_heads(module: SelfAttention, query: Tensor, key: Tensor) -> None:
    """Raises unless the heads that came are those that the layer, or who records it, takes them for."""
    config, mesh = module.config, _head_mesh(module)
    whole, made = (config.num_attention_heads, config.num_key_value_heads), (query.shape[1], key.shape[1])
    if hasattr(module, "moda") or hasattr(module, "moda_recorder") or made[0] * whole[1] != made[1] * whole[0]:
        size = 1 if mesh is None else mesh.size()
        refuse_split_heads("MODA", made, (whole[0] // size, whole[1] // size))


def _check_premises(
    module: SelfAttention, query: Tensor, key: Tensor, context: ModalityContext, kwargs: dict
) -> CacheLayerMixin | None:
    """Raises unless query, keys and context belong to one pass, as far as shapes tell. Returns the layer's cache."""
    tokens, keys, cache = (query.shape[0], query.shape[2]), key.shape[2], context.cache
    if context.query_modality.shape != tokens:
        _fail(f"modalities came for {tuple(context.query_modality.shape)} tokens, queries for {tokens}")
    if any(isinstance(value, Cache) and value is not cache for value in kwargs.values()):
        _fail("a cache came to the attention that did not come to the text stack")
    if cache is None:
        if keys != tokens[1]:
            _fail(f"{keys} keys came with {tokens[1]} tokens and no cache")
        return None
    cached, start = cache.layers[module.layer_idx], context.start
    if isinstance(cached, StaticLayer):
        if keys != cached.max_cache_len and not isinstance(cached, StaticSlidingWindowLayer):
            _fail(f"{keys} keys came from a static cache of {cached.max_cache_len}")
    elif isinstance(cached, MODADynamicLayer):
        total = start + tokens[1]
        windowed = isinstance(cached, MODADynamicSlidingWindowLayer)
        if cached.get_seq_length() != total or (keys > total if windowed else keys != total):
            _fail(
                f"{keys} keys came and the cache holds {cached.get_seq_length()} tokens, where {start} came before "
                f"and {tokens[1]} are new"
            )
    else:
        _fail(f"the cache has a layer of {type(cached).__name__}")
    return cached


def _check_options(module: nn.Module, own_mask: bool, kwargs: dict) -> None:
    """Raises where the model asks for something that modular attention would ignore."""
    if kwargs.get("dropout"):
        raise NotImplementedError(
            f"attention 'moda' has no dropout, got {kwargs['dropout']}; set attention_dropout=0 in the config, "
            "or model.eval() to measure"
        )
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention 'moda' has no {name}, got {kwargs[name]} {versions()}")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal) and not own_mask:
        raise NotImplementedError("attention 'moda' is causal, and this layer is not")


def _fail(what: str) -> NoReturn:
    raise RuntimeError(
        f"MODA: {what}. Its premises do not hold and the result would be wrong {versions()}. If this Transformers is "
        "newer than the tested ones, install one of those; if an earlier pass with this cache failed, start from an "
        "empty one; with checkpointing of your own pass use_cache=False"
    )


def _has_settings(config: object) -> bool:
    return getattr(config, "moda", None) is not None


def _tokens(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float | None, context: ModalityContext
) -> tuple[Tokens, Tensor | None]:
    """The tokens, and which keys each query sees where the model says.

    Static caches: the unused part has modality -1, and several new tokens are moved to the end.
    """
    device, new, start = query.device, query.shape[2], context.start
    start = start.to(device) if isinstance(start, Tensor) else start
    query_modality = context.query_modality.to(device)
    key_modality = context.key_modality.to(device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(start, Tensor) and key.shape[2] <= key_modality.shape[1] == start + new:
        if key.shape[2] < key_modality.shape[1]:  # a sliding window keeps the last ones
            key_modality = key_modality[:, -key.shape[2] :]  # else one tensor for all layers, see functional/flex.py
        new_key = key[:, :, -new:]
        return Tokens(query, key, value, query_modality, key_modality, new_key, query_modality, scale), visible
    if not isinstance(start, Tensor) and start == 0:  # the first pass
        key, value = key[:, :, :new], value[:, :, :new]
        visible = None if visible is None else visible[..., :new]
        return Tokens(query, key, value, query_modality, query_modality, key, query_modality, scale), visible
    positions = torch.arange(new, device=device) + start
    new_key = key.index_select(2, positions)
    if visible is None and new > 1:
        before = torch.arange(key.shape[2], device=device) < start
        key_modality = torch.cat([key_modality.masked_fill(~before, -1), query_modality], dim=1)
        key = torch.cat([key, new_key], dim=2)
        value = torch.cat([value, value.index_select(2, positions)], dim=2)
    return Tokens(query, key, value, query_modality, key_modality, new_key, query_modality, scale), visible


def _check_past_is_visible(tokens: Tokens, visible: Tensor, start: int | Tensor, aligns: bool) -> None:
    """The Gram of a row is made of all tokens before it, and so is the count of the pseudo scores that are left to it:
    its mask may hide none of them."""
    reason, remedy = ("their Gram would leak", "aligner=None")
    if not aligns:
        reason, remedy = ("a row's pseudo scores are counted from the start of the batch's row", "length=None")
    keys = torch.arange(tokens.key.shape[2], device=tokens.key.device)
    rows = torch.arange(tokens.query.shape[2], device=tokens.key.device) + start
    past = (tokens.key_modality >= 0)[:, None] & (keys <= rows[:, None])  # (B, Nq, Nk)
    past = past & (tokens.query_modality >= 0)[:, :, None]
    hidden, message = (
        (past & ~visible[:, 0]).any(),
        (
            f"{'the aligner' if aligns else 'a mask with a finite length'} cannot run under a mask that hides earlier "
            "tokens (packed sequences, where position_ids start again, or a mask of your own): "
            f"{reason}. Pad the sequences instead, or use {remedy}"
        ),
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~hidden, message)
    elif hidden:
        raise NotImplementedError(message)


def moda_mask(
    *args: Any,
    kv_length: int,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    config: object,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function "moda" of Transformers' ``AttentionMaskInterface``.

    Causal modular attention needs no matrix: the result is the padding mask, (B, kv_length) bool, or None. What else a
    model asks for (sliding windows, bidirectional images, packed sequences, encoders) is what ``sdpa`` would get, and
    so is every mask of a model without settings. The arguments have no defaults: one that a Transformers names
    otherwise is an error.
    """
    if mask_function is not causal_mask_function or not _has_settings(config):
        plain: Callable[..., Tensor | None] = sdpa_mask
        return plain(
            *args,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            **kwargs,
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if padding is None else padding[:, kv_offset : kv_offset + kv_length]


AttentionInterface.register(NAME, moda_attention)
AttentionMaskInterface.register(NAME, moda_mask)
