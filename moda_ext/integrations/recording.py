"""What a meter sees of one attention call: the one interface between the integrations and ``moda_ext.diagnostics``.

An integration calls the recorder of a layer after each of its attention calls with an :class:`AttentionRecord`;
``moda_ext.integrations.transformers.recording`` sets the recorder for a block of code. No N x N matrix is made unless a
recorder asks for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["AttentionRecord", "Recorder", "key_counts", "refuse_replicas"]


def key_counts(
    query_modality: Tensor,
    key_modality: Tensor,
    num_modalities: int = 2,
    *,
    is_causal: bool = True,
    visible: Tensor | None = None,
) -> Tensor:
    """How many keys of each modality every row sees.

    Args:
        query_modality: (B, Nq), integer; only its shape is read.
        key_modality: (B, Nk), integer in [0, M), or -1 for padding, which nobody sees.
        num_modalities: M.
        is_causal: causal, aligned at the bottom right as in :func:`moda_ext.attention.modular_attention`; O(Nk) memory.
        visible: broadcastable to (B, 1, Nq, Nk), bool: what a row may see, instead of ``is_causal``.

    Returns:
        (B, Nq, M), int64.
    """
    modalities = torch.arange(num_modalities, device=key_modality.device)
    members = (key_modality[..., None] == modalities).long()  # (B, Nk, M)
    queries, keys = query_modality.shape[1], key_modality.shape[1]
    if visible is not None:
        return (visible[:, 0].float() @ members.float()).round().long().expand(-1, queries, -1)
    if not is_causal:
        return members.sum(dim=1, keepdim=True).expand(-1, queries, -1)
    seen = torch.nn.functional.pad(members.cumsum(dim=1), (0, 0, 1, 0))  # entry n: in the first n keys
    last = torch.arange(1, queries + 1, device=seen.device) + (keys - queries)
    return seen[:, last.clamp(min=0)]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionRecord:
    r"""One attention call of one layer. Tensors are those of the call, not copies: a recorder keeps none of them.

    In training they carry gradients (a loss may use ``mass``); with gradient checkpointing the recorder is called once
    more when the layer is recomputed.

    Attributes:
        layer: index of the layer in the text stack.
        mass: (B, Hq, Nq, M), float32 or float64: :math:`\sum_{j: a_j = m} p_{ij}` (MATH.md section 3). Rows of padding
            hold anything.
        lse: (B, Hq, Nq), in the dtype of ``mass``: logarithm of the softmax's denominator, with the sink; None if the
            layer's softmax is split, which has two.
        query_modality: (B, Nq), int32: in [0, M), -1 for padding.
        key_modality: (B, Nk), int32: in [0, M), -1 for padding and for the unused part of a static cache.
        query: (B, Hq, Nq, D), or views (M, B, Hq, Nq, D).
        key: (B, Hkv, Nk, D).
        scale: factor of the scores.
        bias: broadcastable to (B, Hq, Nq, M), added to the scores, or None.
        visible: broadcastable to (B, 1, Nq, Nk), bool: True where row i may see key j, padding included; None stands
            for causal attention aligned at the bottom right (row i sees the keys j <= i + Nk - Nq), with padding in
            ``key_modality``. A layer passes a mask only if the model made one (bidirectional images, sliding windows).
    """

    layer: int
    mass: Tensor
    lse: Tensor | None
    query_modality: Tensor
    key_modality: Tensor
    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None = None
    visible: Tensor | None = None

    @property
    def num_modalities(self) -> int:
        """M."""
        return self.mass.shape[-1]

    def key_counts(self) -> Tensor:
        """(B, Nq, M), int64: how many keys of each modality a row sees, itself included. O(Nk) memory if causal."""
        return key_counts(self.query_modality, self.key_modality, self.num_modalities, visible=self.visible)

    def weights(self, start: int = 0, stop: int | None = None) -> Tensor:
        r"""The attention weights :math:`p_{ij} = e^{S_{ij} - L_i}` of the rows start to stop.

        Block by block they give what each key receives without an N x N matrix.

        Returns:
            (B, Hq, stop - start, Nk), in the dtype of ``mass``; 0 where row i does not see key j.

        Raises:
            NotImplementedError: the layer's softmax is split.
        """
        if self.lse is None:
            raise NotImplementedError("AttentionRecord: a layer with softmax='split' has no single matrix of weights")
        rows = self.query_modality.shape[1]
        rows = slice(*slice(start, stop).indices(rows))
        visible = self._visible(rows)
        dtype, group = self.mass.dtype, self.query.shape[-3] // self.key.shape[1]
        query, key = self.query[..., rows, :].to(dtype), self.key.to(dtype).repeat_interleave(group, dim=1)
        columns = self.key_modality[:, None, None]  # (B, 1, 1, Nk)
        if query.dim() == 4:
            scores = query @ key.mT
        else:
            scores = query[0] @ key.mT
            for m in range(1, self.num_modalities):
                scores = torch.where(columns == m, query[m] @ key.mT, scores)
        scores = scores * self.scale
        if self.bias is not None:
            bias = self.bias.to(dtype).expand(self.mass.shape)[:, :, rows]
            index = columns.clamp(min=0).long().expand(*bias.shape[:3], -1)
            scores = scores + bias.gather(-1, index)
        weights = (scores - self.lse[:, :, rows, None]).exp()
        return torch.where(visible, weights, 0.0)

    def _visible(self, rows: slice) -> Tensor:
        """(B, 1, rows, Nk)."""
        keys = self.key_modality.shape[1]
        visible = (self.key_modality >= 0)[:, None, None]
        if self.visible is not None:
            return visible & self.visible.expand(-1, -1, self.query_modality.shape[1], -1)[:, :, rows]
        i = torch.arange(rows.start, rows.stop, device=visible.device)[:, None] + keys - self.query_modality.shape[1]
        return visible & (torch.arange(keys, device=visible.device) <= i)


def refuse_replicas(model: nn.Module) -> None:
    """A recorder is for one model in one thread.

    Raises:
        NotImplementedError: ``model`` has a ``DataParallel`` on several devices in it.
    """
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise NotImplementedError(
            "recording: DataParallel on several devices runs copies of the model in threads. Run model.module while it "
            "is recorded, or use DistributedDataParallel"
        )


Recorder = Callable[[AttentionRecord], None]
