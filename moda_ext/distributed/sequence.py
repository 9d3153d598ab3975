"""One sequence over the ranks of a mesh: who holds which tokens. Public in ``moda_ext.distributed``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from moda_ext._ops.limits import accumulation_dtype
from moda_ext.distributed.mesh import check_mesh

__all__ = ["SequenceShards"]

# Their names since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SequenceShards:
    r"""How one sequence of N tokens is spread over the W ranks of a mesh, each with N / W of them.

    - ``zigzag=True``: the sequence is cut into 2W chunks, and rank r holds chunks r and 2W - 1 - r, in this order.
      Under a causal mask every rank then has the same work.
    - ``zigzag=False``: W chunks, and rank r holds chunk r. The last rank has the most work.

    Args:
        mesh: a ``DeviceMesh`` of one dimension, such as ``init_device_mesh("cuda", (W,))`` or ``mesh["cp"]`` of a
            larger one. It is held, and not its process group, so that modules with shards can be copied.
        zigzag: the layout.

    Raises:
        TypeError: ``mesh`` is no ``DeviceMesh``.
        ValueError: a mesh of more than one dimension, or this rank is not in it.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,))  # on two ranks
        >>> shards = SequenceShards(mesh)
        >>> shards.shard(torch.arange(8), 0)  # on rank 0: chunks 0 and 3 of four
        tensor([0, 1, 6, 7])
        >>> shards.gather(shards.shard(torch.arange(8), 0), 0)
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(self, mesh: DeviceMesh, zigzag: bool = True):
        check_mesh("SequenceShards", mesh, "cp")
        if mesh.get_coordinate() is None:
            raise ValueError("SequenceShards: mesh must hold this rank")
        self.mesh, self.zigzag = mesh, bool(zigzag)
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.num_chunks = 2 * self.size if self.zigzag else self.size

    def __repr__(self) -> str:
        return f"SequenceShards(rank {self.rank} of {self.size}, zigzag={self.zigzag})"

    def chunks_of(self, rank: int) -> list[int]:
        """The chunks of a rank, in the order in which it holds them."""
        return [rank, self.num_chunks - 1 - rank] if self.zigzag else [rank]

    @property
    def chunks(self) -> list[int]:
        """The chunks of this rank."""
        return self.chunks_of(self.rank)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of the whole sequence.

        Args:
            x: the whole, with N tokens in dimension ``dim``, the same on every rank. Any dtype.
            dim: the dimension of the tokens.

        Returns:
            A tensor with N / W tokens in dimension ``dim``. Differentiable: the gradient of ``x`` has this rank's part.

        Raises:
            ValueError: N is not a multiple of the number of chunks; the message says how many tokens are missing.
        """
        self.check_length("SequenceShards.shard", "x", x.shape[dim])
        return self.part_of(x, dim, self.rank)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence, in its own order, from every rank's tokens.

        Args:
            x: this rank's tokens, N / W of them in dimension ``dim``; shape and dtype are the same on every rank.
            dim: the dimension of the tokens.

        Returns:
            A tensor with N tokens in dimension ``dim``. Differentiable: the gradient of ``x`` is the sum over the ranks
            of what each has for these tokens, made in float32 (float64 for float64).

        Raises:
            ValueError: N / W is odd in the zigzag layout.
        """
        self.check_length("SequenceShards.gather", "x of all ranks", x.shape[dim] * self.size)
        gathered: Tensor = _Gather.apply(x, dim, self)
        return gathered

    def check_length(self, op: str, name: str, length: int) -> None:
        """Raise unless so many tokens can be cut into chunks."""
        missing = -length % self.num_chunks
        if missing:
            layout = "2 chunks for each" if self.zigzag else "a chunk for each"
            raise ValueError(
                f"{op}: {name} must have a number of tokens that is a multiple of {self.num_chunks} ({layout} of "
                f"{self.size} ranks), got {length}; pad with {missing} tokens of modality -1"
            )

    # Without gradients, and without checks.

    def part_of(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The tokens of the whole ``x`` that a rank holds."""
        length = x.shape[dim] // self.num_chunks
        return torch.cat([x.narrow(dim, chunk * length, length) for chunk in self.chunks_of(rank)], dim)

    def in_order(self, parts: Tensor, dim: int) -> Tensor:
        """The whole from ``parts`` (W, ...) of all ranks, with tokens in dimension ``dim`` of each."""
        dim = dim % (parts.dim() - 1)
        chunks = parts.unflatten(dim + 1, (self.num_chunks // self.size, -1))
        places = sorted((c, rank, i) for rank in range(self.size) for i, c in enumerate(self.chunks_of(rank)))
        return torch.cat([chunks[rank].select(dim, i) for _, rank, i in places], dim)

    def by_rank(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`in_order`."""
        return torch.stack([self.part_of(x, dim, rank) for rank in range(self.size)])

    def collect(self, x: Tensor, dim: int) -> Tensor:
        """:meth:`gather` without a gradient."""
        return self.in_order(self.of_every_rank(x), dim)

    def of_every_rank(self, x: Tensor) -> Tensor:
        """(W, ...): ``x`` of rank r at r."""
        parts = x.new_empty((self.size, *x.shape))
        _all_gather(parts.view(-1), x.contiguous().view(-1), group=self.mesh.get_group())
        return parts

    def sum_of_parts(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of the sum over the ranks of whole tensors ``x``."""
        parts = self.by_rank(x, dim)
        total = torch.empty_like(parts[0])
        _reduce_scatter(total.view(-1), parts.view(-1), group=self.mesh.get_group())
        return total

    def exchange(self, parts: Tensor) -> Tensor:
        """``parts`` (W, ...): part r goes to rank r, and what comes back in its place is from there. Differentiable."""
        exchanged: Tensor = _Exchange.apply(parts, self)
        return exchanged


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shards: SequenceShards) -> Tensor:
        ctx.rest = dim, shards, x.dtype
        return shards.collect(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dim, shards, dtype = ctx.rest
        return shards.sum_of_parts(grad.to(accumulation_dtype(dtype)), dim).to(dtype), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        return _exchange(parts, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.shards), None


def _exchange(parts: Tensor, shards: SequenceShards) -> Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=shards.mesh.get_group())
    return received
