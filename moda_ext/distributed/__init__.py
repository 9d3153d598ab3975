"""MODA on many devices: plain ``torch.distributed`` over a ``DeviceMesh``, no engine of its own."""

from moda_ext.distributed.context_parallel import context_parallel_attention
from moda_ext.distributed.sequence import SequenceShards

__all__ = ["SequenceShards", "context_parallel_attention"]
