"""What MODA must know of a model over many processes: tensor parallelism, sharded weights, sequences cut by others."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import is_available
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moda_ext.nn.guards import refuse_split_tokens
from moda_ext.nn.layer import DuplexLayer

if is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, distribute_tensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    from moda_ext.distributed.heads import broadcast_parameters, split_heads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from moda_ext.integrations.transformers.parts import TextStack

__all__ = [
    "head_mesh",
    "make_replicas_equal",
    "refuse_other_sequence_parallelism",
    "refuse_sharded_weights",
    "sharded_like",
    "split_over_model",
]

STYLE = "moda_heads"  # in the tensor-parallel plans of Transformers

INSTEAD = "moda_ext.integrations.transformers.context_parallel(model, mesh) around the steps"


def refuse_other_sequence_parallelism() -> None:
    """Raises in every process while another library cuts the tokens of a model over processes.

    Raises:
        NotImplementedError: torch's context parallelism, DeepSpeed's sequence parallelism, or either by Accelerate.
    """
    refuse_split_tokens("MODA", INSTEAD)
    engine = _engine()
    if engine is not None:
        raise NotImplementedError(
            f"MODA: {engine} is on. It cuts the tokens over processes and replaces attention functions other than "
            f"'moda', so modular attention would see the tokens of its own process alone. Use {INSTEAD}"
        )


@torch.compiler.assume_constant_result
def _engine() -> str | None:
    """Engines are set up before a model runs, so a graph may keep the answer."""
    accelerate = sys.modules.get("accelerate.state")
    config = None if accelerate is None else accelerate.AcceleratorState._shared_state.get("parallelism_config")
    if config is not None and config.cp_enabled:
        return "Accelerate's context parallelism (cp_size > 1)"
    if config is not None and config.sp_enabled:
        return "Accelerate's sequence parallelism (sp_size > 1)"
    functions = ALL_ATTENTION_FUNCTIONS.values()
    if any(getattr(function, "__module__", "").startswith("deepspeed.") for function in functions):
        return "DeepSpeed's sequence parallelism (UlyssesSPAttentionHF)"
    return None


if is_available():

    class MODAHeads(TensorParallelLayer):
        """The style "moda_heads" of ``self_attn.moda``: :func:`moda_ext.distributed.split_heads`."""

        def install_forward(self, module: DuplexLayer, mesh: DeviceMesh) -> DuplexLayer:
            split_heads(module, mesh)
            return module

    ALL_PARALLEL_STYLES.register(STYLE, MODAHeads())  # type: ignore[arg-type]  # styles are registered as functions are


def split_over_model(model: PreTrainedModel, stack: TextStack, layers: Collection[DuplexLayer]) -> None:
    """Puts MODA's rule into the model's tensor-parallel plan, and obeys it if the model is tensor parallel already.

    Where the plan does not split ``q_proj`` by columns, every process computes all heads, and needs equal values only.
    """
    splits, plan, mesh = _splits_heads(model, stack), model._tp_plan, _tensor_parallel_mesh(model)
    if layers and splits and plan is not None:
        plan[f"{_rule(model, stack)}.moda"] = STYLE
    if mesh is not None:
        for layer in layers:
            (split_heads if splits else broadcast_parameters)(layer, mesh)


def make_replicas_equal(model: PreTrainedModel, layer: DuplexLayer) -> None:
    """Gives a layer's parameters, which are fresh in every process, the values of a tensor-parallel group's first."""
    mesh = _tensor_parallel_mesh(model)
    if mesh is not None:
        broadcast_parameters(layer, mesh)


def head_mesh(model: PreTrainedModel, stack: TextStack) -> DeviceMesh | None:
    """The mesh over which the heads of a model's text stack are split, None if they are not, or nothing is known."""
    splits = (getattr(module, "head_split", None) for module in stack.modules())
    known = next((split.mesh for split in splits if split is not None), None)
    return known if known is not None or not _splits_heads(model, stack) else _tensor_parallel_mesh(model)


def _tensor_parallel_mesh(model: PreTrainedModel) -> DeviceMesh | None:
    """That of Transformers' own tensor parallelism."""
    meshes = model._mesh_manager
    return None if meshes is None or (model._tp_size or 1) == 1 else meshes.get_mesh("tp")


def _rule(model: PreTrainedModel, stack: TextStack) -> str:
    """How plans name ``self_attn`` of the layers."""
    name = next(name for name, module in model.named_modules() if module is stack)
    return ".".join(filter(None, (name, "layers.*.self_attn")))


def _splits_heads(model: PreTrainedModel, stack: TextStack) -> bool:
    return (model._tp_plan or {}).get(f"{_rule(model, stack)}.q_proj") == "colwise"


def refuse_sharded_weights(model: nn.Module, caller: str) -> None:
    """Raises if FSDP has the model's weights: parameters that come later would be on their own in every process.

    Raises:
        NotImplementedError: it has.
    """
    if is_available() and any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise NotImplementedError(
            f"{caller}: the model is sharded by FSDP already, which would not know of MODA's parameters: their "
            "gradients would stay those of their own process. Apply MODA first; or load a checkpoint with settings in "
            "config.text_config.moda and attn_implementation='moda'"
        )


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor in the layout of another, which may be sharded: then by the values of the mesh's first process."""
    value = value.to(tensor.device, tensor.dtype)
    if is_available() and isinstance(tensor, DTensor):
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return value
