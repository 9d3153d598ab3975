"""MODA on many devices, by PyTorch's own means: ``torch.distributed`` and :class:`~torch.distributed.DeviceMesh`."""

from moda_ext.distributed.heads import SplitHeads, split_heads

__all__ = ["SplitHeads", "split_heads"]
