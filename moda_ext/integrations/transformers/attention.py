"""The attention function "moda", its mask function, and the module with a layer's MODA parameters.

Data of one call: the hooks of ``hooks.py`` give every layer a :class:`ModalityContext`; :func:`moda_attention` brings
keys and modalities to the form of the operators and calls the layer's :class:`MODAAttention`, or plain attention. A
text stack has hooks if and only if its config has settings (``config.moda``); without both, "moda" is ``sdpa``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import initialization as init
from transformers.cache_utils import Cache, StaticSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from moda_ext import reference
from moda_ext._ops.checks import accumulation_dtype
from moda_ext.alignment import DuplexAligner, GramState
from moda_ext.attention import modular_attention
from moda_ext.integrations.recording import AttentionRecord
from moda_ext.integrations.transformers.cache import MODADynamicLayer, MODAStaticLayer
from moda_ext.integrations.transformers.config import MODAConfig
from moda_ext.layer import Tokens, align_and_attend
from moda_ext.mask import ModularMask
from moda_ext.release import ReleaseAligner

__all__ = ["MODAAttention", "ModalityContext"]

NAME = "moda"


class ModalityContext(NamedTuple):
    """What the layers of one forward pass know of the tokens."""

    query_modality: Tensor  # (B, Nq), int32, -1 for padding
    key_modality: Tensor  # (B, tokens seen), or (B, max_cache_len) of a static cache
    start: int | Tensor  # tokens before the new ones
    num_modalities: int
    cache: Cache | None


class MODAAttention(nn.Module):
    """What a layer's attention has of MODA: the aligner and the mask, ``self_attn.moda``.

    Args:
        config: the settings.
        num_heads: Hq.
        head_dim: D.
    """

    def __init__(self, config: MODAConfig, num_heads: int, head_dim: int):
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        self.aligner = self.mask = None
        with torch.device("cpu"):  # also where a model is made on the meta device: the mask checks its values
            if config.mode == "release":
                self.aligner = ReleaseAligner(head_dim)
            elif config.aligner is not None:
                self.aligner = DuplexAligner(head_dim, config.num_modalities, **config.aligner)
            if config.mask is not None:
                self.mask = ModularMask(num_heads, config.num_modalities, **config.mask_options())

    def reset_parameters(self) -> None:
        """The values of a new module, except in tensors that a checkpoint has filled."""
        fresh = MODAAttention(self.config, self.num_heads, self.head_dim).state_dict()
        for name, tensor in self.state_dict(keep_vars=True).items():
            init.copy_(tensor, fresh[name])

    def forward(
        self,
        tokens: Tokens,
        visible: Tensor | None,
        state: GramState | None,
        keep_state: bool,
        start: Tensor | int,
        record: bool,
    ):
        """One attention call.

        Args:
            tokens: the queries, keys and modalities, ``new_key`` those of the query's tokens.
            visible: a mask of the model's own, instead of causal attention.
            state: the Gram of the tokens before, or None: then it is made of all keys in ``tokens``.
            keep_state: also make the Gram after this call.
            start: (B,) or a number, how many tokens came before without padding.
            record: also return what a recorder gets.

        Returns:
            ``(out (B, Hq, Nq, D), state or None, what is recorded or None)``, the latter as keyword arguments of
            :class:`~moda_ext.integrations.recording.AttentionRecord`.
        """
        aligner = self.aligner
        if isinstance(aligner, ReleaseAligner):
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
        options = {"gram": state, "keep_gram": keep_state, "start": start, "show": record}
        out, lse, mass, views, bias, state = align_and_attend(
            aligner, self.mask, tokens, self.config.num_modalities, **options, attention=attention_under(visible)
        )
        recorded = {"mass": mass, "lse": lse, "query": views, "key": tokens.key, "bias": bias} if record else None
        return out, state, recorded

    def extra_repr(self) -> str:
        return f"modalities={self.config.modalities}, mode={self.config.mode!r}"


def attention_under(visible: Tensor | None):
    """``modular_attention``, or the same by N x N scores under a mask of the model's own."""
    if visible is None:
        return modular_attention

    def attention(query, key, value, key_modality, *, is_causal, return_lse, return_mass, **options):
        dtype = accumulation_dtype(query.dtype)
        arguments = *(t.to(dtype) for t in (query, key, value)), key_modality.long()
        out, lse, mass = reference.dense_attention(*arguments, **options, visible=visible)
        return out.to(value.dtype), lse, mass

    return attention


def moda_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    modality_context: ModalityContext | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function "moda" of Transformers' ``AttentionInterface``.

    In a layer with ``module.moda`` modular attention; in one without, plain attention equal to ``sdpa``. With
    ``module.moda_recorder`` set, the recorder gets an :class:`~moda_ext.integrations.recording.AttentionRecord`.
    """
    moda, recorder = getattr(module, "moda", None), getattr(module, "moda_recorder", None)
    if modality_context is None:
        if _has_settings(getattr(module, "config", None)):
            raise RuntimeError(
                "attention 'moda' has settings (text_config.moda), and nothing derives the modalities of the tokens. "
                "Use a ...ForConditionalGeneration model of a family that moda_ext.integrations.transformers knows, "
                "and import that module before the model is made; or call apply_moda(model)"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    own_mask = attention_mask is not None and attention_mask.dim() == 4
    if moda is None and recorder is None and (kwargs.get("sliding_window") is not None or own_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    dropout, scaling, softcap = kwargs.get("dropout", 0.0), kwargs.get("scaling"), kwargs.get("softcap")
    if dropout:
        raise NotImplementedError(
            f"attention 'moda' has no dropout, got {dropout}; set attention_dropout=0 in the config"
        )
    if softcap is not None:
        raise NotImplementedError(f"attention 'moda' has no softcap, got {softcap}")

    cached = None if modality_context.cache is None else modality_context.cache.layers[module.layer_idx]
    if isinstance(cached, StaticSlidingWindowLayer):
        raise NotImplementedError("a layer with a static sliding-window cache cannot be recorded; use a dynamic cache")
    tokens, visible = _tokens(query, key, value, attention_mask if own_mask else None, scaling, modality_context)
    if moda is None:
        attention = attention_under(visible)
        attended = align_and_attend(None, None, tokens, modality_context.num_modalities, attention=attention)
        out, lse, mass = attended.out, attended.lse, attended.mass
        recorded = {"mass": mass, "lse": lse, "query": tokens.query, "key": tokens.key}
    else:
        if visible is not None and isinstance(moda.aligner, DuplexAligner):
            _check_past_is_visible(tokens, visible, modality_context.start)
        keep_state = isinstance(cached, MODADynamicLayer | MODAStaticLayer) and isinstance(moda.aligner, DuplexAligner)
        state = cached.gram if keep_state else None
        if keep_state and isinstance(cached, MODAStaticLayer) and state is None:
            state = GramState.from_keys(
                tokens.new_key[:, :, :0],
                tokens.query_modality[:, :0],
                modality_context.num_modalities,
                key_norm=moda.aligner.key_norm,
                window=0,
            )
        start = 0
        if moda.mask is not None and moda.mask.length is not None:  # pseudo scores that end somewhere
            seen = modality_context.key_modality >= 0
            start = seen.sum(dim=1).to(query.device) - (tokens.query_modality >= 0).sum(dim=1)
        out, state, recorded = moda(tokens, visible, state, keep_state, start, recorder is not None)
        if keep_state:
            state = state.detach()
            if isinstance(cached, MODAStaticLayer):
                cached.store(state)
            else:
                cached.gram = state
    if recorder is not None:
        recorder(
            AttentionRecord(
                layer=module.layer_idx,
                query_modality=tokens.query_modality,
                key_modality=tokens.key_modality,
                scale=tokens.scale,
                visible=visible,
                **recorded,
            )
        )
    return out.transpose(1, 2).contiguous(), None


def _has_settings(config) -> bool:
    return getattr(config, "moda", None) is not None


def _tokens(query, key, value, visible, scaling, context: ModalityContext) -> tuple[Tokens, Tensor | None]:
    """The tokens, and which keys each query sees where the model says.

    Static caches: the unused part has modality -1, and several new tokens are moved to the end.
    """
    device, new, start = query.device, query.shape[2], context.start
    start = start.to(device) if isinstance(start, Tensor) else start
    query_modality = context.query_modality.to(device)
    key_modality = context.key_modality.to(device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(start, Tensor) and key.shape[2] <= key_modality.shape[1] == start + new:
        key_modality = key_modality[:, -key.shape[2] :]  # a sliding window keeps the last ones
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


def _check_past_is_visible(tokens: Tokens, visible: Tensor, start: int | Tensor) -> None:
    """The Gram of a row is made of all tokens before it, so its mask may hide none of them.

    Not checked while compiling: the answer depends on values.
    """
    if torch.compiler.is_compiling():
        return
    keys = torch.arange(tokens.key.shape[2], device=tokens.key.device)
    rows = torch.arange(tokens.query.shape[2], device=tokens.key.device) + start
    past = (tokens.key_modality >= 0)[:, None] & (keys <= rows[:, None])  # (B, Nq, Nk)
    past = past & (tokens.query_modality >= 0)[:, :, None]
    if (past & ~visible[:, 0]).any():
        raise NotImplementedError(
            "the aligner cannot run under a mask that hides earlier tokens (packed sequences, where position_ids start "
            "again, or a mask of your own): their Gram would leak. Pad the sequences instead, or use aligner=None"
        )


def moda_mask(
    *args,
    kv_length: int,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    config=None,
    **kwargs,
) -> Tensor | None:
    """The mask function "moda" of Transformers' ``AttentionMaskInterface``.

    Causal modular attention needs no matrix: the result is the padding mask, (B, kv_length) bool, or None. What else a
    model asks for (sliding windows, bidirectional images, packed sequences, encoders) is what ``sdpa`` would get, and
    so is every mask of a model without settings.
    """
    if mask_function is not causal_mask_function or not _has_settings(config):
        options = {"kv_length": kv_length, "kv_offset": kv_offset, "mask_function": mask_function, "config": config}
        return sdpa_mask(*args, **options, attention_mask=attention_mask, **kwargs)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if padding is None else padding[:, kv_offset : kv_offset + kv_length]


AttentionInterface.register(NAME, moda_attention)
AttentionMaskInterface.register(NAME, moda_mask)
