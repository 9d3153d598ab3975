"""Recorders on the attention layers of a model: of this package's own layers, or through an integration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moda_ext.integrations.recording import AttentionRecord, Recorder, refuse_replicas
from moda_ext.nn.attention import ModularDuplexAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moda_ext.distributed.heads import HeadSplit

__all__ = ["all_heads", "in_backward", "mean_over_heads", "recorded"]


def in_backward() -> bool:
    """Is this a backward pass, where gradient checkpointing computes layers once more? Asked as checkpointing asks."""
    return torch._C._current_graph_task_id() != -1


def all_heads(values: Tensor, mesh: DeviceMesh | None, dim: int) -> Tensor:
    """The values of all heads from those of this process's heads, which are all where ``mesh`` is None."""
    return values if mesh is None else _split(mesh).gather(values, dim)


def mean_over_heads(mean: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The mean over all heads from that over this process's heads; differentiable."""
    return mean if mesh is None else _split(mesh).mean(mean)


def _split(mesh: DeviceMesh) -> HeadSplit:
    from moda_ext.distributed.heads import HeadSplit  # a torch without torch.distributed has no mesh

    return HeadSplit(mesh)


@contextlib.contextmanager
def recorded(
    model: nn.Module, recorder: Recorder, modalities: dict[str, int] | None = None
) -> Iterator[tuple[Mapping[int, nn.Module], dict[str, int] | None]]:
    """Calls ``recorder`` with an ``AttentionRecord`` after every attention call of ``model`` while the block runs.

    Args:
        model: has :class:`moda_ext.attention.ModularDuplexAttention` layers, or is a Transformers model (see
            :func:`moda_ext.integrations.transformers.recording`); also inside of wrappers.
        recorder: called with the records, once more where gradient checkpointing computes a layer once more.
        modalities: the number of each kind of token, for a Transformers model without MODA; for our own layers, the
            names of their modalities.

    Yields:
        ``(blocks, modalities)``: the module around each layer's attention, by layer index, and the numbers of the kinds
        of token, or None where the model has no names for them.

    Raises:
        RuntimeError: a layer of ours has a recorder already.
        ValueError: a Transformers model of an unknown family, or one that is recorded already.
        NotImplementedError: a model in ``DataParallel`` on several devices.
        ImportError: the model has no layers of ours, and Transformers is not installed.
    """
    refuse_replicas(model)
    own = [module for module in model.modules() if isinstance(module, ModularDuplexAttention)]
    if own:
        if any(layer.recorder is not None for layer in own):
            raise RuntimeError("recorded: a layer of the model has a recorder already")
        try:
            for index, layer in enumerate(own):
                layer.recorder = _layer_recorder(index, layer.is_causal, recorder)
            yield dict(enumerate(own)), modalities
        finally:
            for layer in own:
                layer.recorder = None
        return

    from moda_ext.integrations.transformers import recording, text_stack

    with recording(model, recorder, modalities):
        stack = text_stack(model)
        yield {layer.self_attn.layer_idx: layer for layer in stack.layers}, stack.config.moda["modalities"]


def _layer_recorder(index: int, is_causal: bool, recorder: Recorder) -> Callable[..., None]:
    def record(*, query_modality: Tensor, key_modality: Tensor, **tensors: Any) -> None:
        visible = None
        if not is_causal:
            visible = torch.ones(1, 1, 1, key_modality.shape[1], dtype=torch.bool, device=key_modality.device)
        recorder(
            AttentionRecord(
                layer=index, visible=visible, query_modality=query_modality, key_modality=key_modality, **tensors
            )
        )

    return record
