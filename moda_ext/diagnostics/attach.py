"""Recorders on the attention layers of a model: of this package's own layers, or through an integration."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from moda_ext.integrations.recording import AttentionRecord, Recorder
from moda_ext.layer import ModularDuplexAttention

__all__ = ["recorded"]


@contextlib.contextmanager
def recorded(model: nn.Module, recorder: Recorder):
    """Calls ``recorder`` with an ``AttentionRecord`` after every attention call of ``model`` while the block runs.

    Yields:
        ``(blocks, modalities)``: the module around each layer's attention, by layer index, and the names of the model's
        modalities, or None where it has none.

    Raises:
        RuntimeError: a layer has a recorder already.
        NotImplementedError: a model that is neither of a family that Transformers' integration knows nor has layers of
            this package.
    """
    own = [module for module in model.modules() if isinstance(module, ModularDuplexAttention)]
    if not own:
        with _transformers_recording(model, recorder) as names:
            yield names
        return
    if any(layer.recorder is not None for layer in own):
        raise RuntimeError("recorded: a layer of the model has a recorder already")
    try:
        for index, layer in enumerate(own):
            layer.recorder = _layer_recorder(index, layer.is_causal, recorder)
        yield dict(enumerate(own)), None
    finally:
        for layer in own:
            layer.recorder = None


def _layer_recorder(index: int, is_causal: bool, recorder: Recorder):
    def record(*, query_modality, key_modality, **tensors):
        visible = None
        if not is_causal:
            visible = torch.ones((), dtype=torch.bool, device=key_modality.device)
            visible = visible.expand(len(key_modality), 1, query_modality.shape[1], key_modality.shape[1])
        modalities = {"query_modality": query_modality, "key_modality": key_modality}
        recorder(AttentionRecord(layer=index, visible=visible, **modalities, **tensors))

    return record
