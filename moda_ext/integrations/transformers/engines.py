"""What training engines do to a model that MODA must know of: sequence parallelism of others, and sharded weights."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.distributed import is_available
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moda_ext.nn.guards import refuse_split_tokens

if is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["refuse_other_sequence_parallelism", "refuse_sharded_weights", "sharded_like"]

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
