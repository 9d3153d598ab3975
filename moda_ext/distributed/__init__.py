"""MODA on many devices, by PyTorch's own means: ``torch.distributed`` and :class:`~torch.distributed.DeviceMesh`."""

from moda_ext.distributed.context_parallel import context_parallel_attention
from moda_ext.distributed.heads import SplitHeads, split_heads
from moda_ext.distributed.sequence import SequenceShards

__all__ = ["SequenceShards", "SplitHeads", "context_parallel_attention", "split_heads"]
