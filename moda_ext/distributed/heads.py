"""Tensor parallelism: the heads of MODA layers over the processes of a mesh.

The aligner's and the mask's parameters are few, 4 M D r + H (2 M^2 + 2) numbers of a layer, so every process keeps all
of them. In a forward pass it takes the mask's rows of its own heads; in the backward pass the gradients of all of a
layer's parameters are summed over the mesh in one all-reduce, on their way to ``.grad``. So they are whole there in
every process, also where several backward passes add to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from moda_ext.distributed.mesh import check_mesh
from moda_ext.nn.layer import DuplexLayer

__all__ = ["HeadSplit", "SplitHeads", "broadcast_parameters", "split_heads"]


class _SumGradients(torch.autograd.Function):
    """Tensors as they are, whose gradients are summed over a group in one all-reduce, at least in float32."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.likes = group, [(tensor.shape, tensor.dtype) for tensor in tensors]
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dtype = torch.float64 if any(like == torch.float64 for _, like in ctx.likes) else torch.float32
        device = next(grad.device for grad in grads if grad is not None)
        # The same numbers in the same places in every process, whatever has a gradient: nobody can wait for others.
        parts = [
            torch.zeros(shape.numel(), dtype=dtype, device=device) if grad is None else grad.reshape(-1).to(dtype)
            for grad, (shape, _) in zip(grads, ctx.likes, strict=True)
        ]
        total = torch.cat(parts)
        dist.all_reduce(total, group=ctx.group)
        sums = total.split([part.numel() for part in parts])
        return None, *(
            None if grad is None else own.view(shape).to(like)
            for grad, own, (shape, like) in zip(grads, sums, ctx.likes, strict=True)
        )


class _Mean(torch.autograd.Function):
    """The mean over a group of a number of each process, for a loss that every process then has whole."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, value: Tensor) -> Tensor:
        ctx.size = group.size()
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total / ctx.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad / ctx.size


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """How a layer's heads are split: process r of the mesh has the heads r H / W to (r + 1) H / W.

    Args:
        mesh: of one dimension. Not its process group, which cannot be copied with the layer.
    """

    mesh: DeviceMesh

    def __deepcopy__(self, memo: dict) -> HeadSplit:
        return self

    @property
    def size(self) -> int:
        return self.mesh.size()

    @contextlib.contextmanager
    def own_heads(self, layer: DuplexLayer) -> Iterator[None]:
        """A block in which the layer's aligner and mask have the tensors of this process's heads.

        Raises:
            RuntimeError: some are sharded in it, by an FSDP that would bring others than these, or are no parameters.
        """
        mask, places = layer.mask, list(_places(layer))
        group, rank = self.mesh.get_group(), self.mesh.get_local_rank()
        before = [tensors[name] for tensors, name, _ in places]
        if any(isinstance(tensor, DTensor) for tensor in before):
            raise RuntimeError(
                "MODA: aligner or mask of a layer with split heads are sharded for themselves. Call fully_shard on the "
                "layer, or on a block around it, so that they are whole in the layer's forward pass"
            )
        parts = [module for part in (layer.aligner, mask) if part is not None for module in part.modules()]
        flat = any(isinstance(value, Tensor) and value.requires_grad for part in parts for value in vars(part).values())
        if flat and torch.is_grad_enabled():
            raise RuntimeError(
                "MODA: aligner or mask of a layer with split heads have no parameters in its forward pass, whose "
                "gradients could be summed: give FullyShardedDataParallel use_orig_params=True, or use fully_shard"
            )
        local = list(before)
        wanted = [index for index, tensor in enumerate(before) if tensor.requires_grad]
        if wanted and torch.is_grad_enabled():
            for index, tensor in zip(wanted, _SumGradients.apply(group, *(before[i] for i in wanted)), strict=True):
                local[index] = tensor
        try:
            for (tensors, name, by_head), tensor in zip(places, local, strict=True):
                tensors[name] = tensor.tensor_split(self.size)[rank] if by_head else tensor
            if mask is not None:
                mask.num_heads //= self.size
            yield
        finally:
            for (tensors, name, _), tensor in zip(places, before, strict=True):
                tensors[name] = tensor
            if mask is not None:
                mask.num_heads = layer.whole_heads

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """All heads of a tensor with this process's heads in a dimension. Not differentiable."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, dim=dim)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over the processes, differentiable: as that of all heads, of a mean over own heads."""
        return _Mean.apply(self.mesh.get_group(), value)


def _places(layer: DuplexLayer) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Where aligner and mask have their tensors: a module's dictionary, the name there, and whether by head."""
    for part in (layer.aligner, layer.mask):
        for module in () if part is None else part.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        yield tensors, name, part is layer.mask


def split_heads(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tells MODA layers that their heads are split over the processes of a mesh; returns ``module``.

    The layers' projections must be split by heads too: ``q_proj``, ``k_proj`` and ``v_proj`` by columns, ``o_proj`` by
    rows. A model that Transformers loaded with a ``tp_plan`` needs no call. Every process of the mesh must call this:
    the values of aligner and mask become those of its first process.

    Args:
        module: a :class:`moda_ext.attention.ModularDuplexAttention`, the ``self_attn.moda`` of a Transformers model, or
            a module with some of these in it.
        mesh: of one dimension, W processes.

    Raises:
        TypeError: ``mesh`` is not a DeviceMesh.
        ValueError: it has several dimensions; there is no MODA layer in ``module``, or one whose heads are split
            already, or whose heads or key/value heads W does not divide.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        >>> mesh = init_device_mesh("cuda", (8,))  # doctest: +SKIP
        >>> columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        >>> parallelize_module(layer, mesh, {**columns, "o_proj": RowwiseParallel()})  # doctest: +SKIP
        >>> split_heads(layer, mesh)  # doctest: +SKIP
    """
    check_mesh("split_heads", mesh, "tp")
    layers = [layer for layer in module.modules() if isinstance(layer, DuplexLayer)]
    if not layers:
        raise ValueError(f"split_heads: module must be a MODA layer or have some in it, got {type(module).__name__}")
    for layer in layers:
        if layer.head_split is not None:
            raise ValueError("split_heads: the heads of a layer in module are split already")
        for name, heads in (("heads", layer.whole_heads), ("key/value heads", layer.whole_kv_heads)):
            if heads is not None and heads % mesh.size():
                raise ValueError(f"split_heads: mesh must divide the {heads} {name} of a layer, got {mesh.size()}")
    for layer in layers:
        layer.head_split = HeadSplit(mesh)
        broadcast_parameters(layer, mesh)
    return module


@torch.no_grad()
def broadcast_parameters(layer: DuplexLayer, mesh: DeviceMesh) -> None:
    """Gives a layer's aligner and mask the values that they have in the first process of a mesh of one dimension."""
    for tensors, name, _ in _places(layer):
        tensor = tensors[name].detach()
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # sharded alike in every process
        if not tensor.is_meta and tensor.numel():
            dist.broadcast(tensor, group=mesh.get_group(), group_src=0)


class SplitHeads(ParallelStyle):
    """:func:`split_heads` as a style of :func:`torch.distributed.tensor.parallel.parallelize_module`.

    Example:
        >>> plan = {"attention": SplitHeads(), "attention.o_proj": RowwiseParallel()}
        >>> plan |= {f"attention.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        >>> parallelize_module(block, mesh, plan)  # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return split_heads(module, device_mesh)
