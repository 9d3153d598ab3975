"""What cuts tokens or heads over processes without a layer's knowing, looked for in every forward pass.

A process that has some of the tokens would attend to these alone, and nothing in the shapes says so.
"""

import sys

import torch
import torch.nn.functional as F

__all__ = ["refuse_split_heads", "refuse_split_tokens"]

PLAIN_SDPA = torch._C._nn.scaled_dot_product_attention


def refuse_split_tokens(caller: str, instead: str) -> None:
    """Raises in every process while torch's context parallelism is on: it changes ``scaled_dot_product_attention``.

    Raises:
        NotImplementedError: it is; ``instead`` is what to use.
    """
    if _torch_splits_tokens():
        raise NotImplementedError(
            f"{caller}: torch's context_parallel is on (Accelerate's cp_size > 1 is that too). It cuts the tokens over "
            "processes and changes scaled_dot_product_attention only, so modular attention would see the tokens of its "
            f"own process alone. Use {instead}"
        )


def refuse_split_heads(caller: str, made: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raises unless a layer's projections make the query heads and key/value heads that it computes with here.

    Raises:
        RuntimeError: they do not, as under tensor parallelism that the layer does not know of.
    """
    if made != expected:
        raise RuntimeError(
            f"{caller}: the projections made {made[0]} query heads and {made[1]} key/value heads, and this layer "
            f"computes with {expected[0]} and {expected[1]} of them. Under tensor parallelism a process has some of "
            "the heads only: say so with moda_ext.distributed.split_heads(model, mesh), or the parallel style "
            "SplitHeads, where and only where q_proj, k_proj and v_proj are split by columns"
        )


def _torch_splits_tokens() -> bool:
    attention = F.scaled_dot_product_attention
    if attention is not PLAIN_SDPA and (attention.__module__ or "").startswith("torch.distributed."):
        return True
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None or torch.compiler.is_compiling():  # which reads no handlers
        return False
    # Wrapped modules instead of a changed function: handlers of DTensor, which have no public name.
    dispatcher = getattr(tensor.DTensor, "_op_dispatcher", None)
    return torch.ops.aten._scaled_dot_product_flash_attention.default in getattr(dispatcher, "_custom_op_handlers", ())
