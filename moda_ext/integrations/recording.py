"""What a meter sees of one attention call: the one interface between the integrations and ``moda_ext.diagnostics``.

An integration calls the recorder of a layer after each of its attention calls with an :class:`AttentionRecord`;
``moda_ext.integrations.transformers.recording`` sets the recorder for a block of code. No N x N matrix is made unless a
recorder asks for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["AttentionRecord", "Recorder", "key_counts", "refuse_replicas"]


ACCURACY = 1e-4  # relative, of weights that are made from lse


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
        mass: (B, Hq, Nq, M), float32 or float64: :math:`\sum_{j: a_j = m} p_{ij}` (docs/mathematics.md section 3). Rows
        of padding
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
        mesh: the DeviceMesh over whose W processes the layer's heads are split: then Hq and Hkv of the tensors above
            are those of this process. None: all heads are here.
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
    mesh: DeviceMesh | None = None

    @property
    def num_modalities(self) -> int:
        """M."""
        return self.mass.shape[-1]

    def key_counts(self) -> Tensor:
        """(B, Nq, M), int64: how many keys of each modality a row sees, itself included. O(Nk) memory if causal."""
        return key_counts(self.query_modality, self.key_modality, self.num_modalities, visible=self.visible)

    def weights(self, start: int = 0, stop: int | None = None) -> Tensor:
        r"""The attention weights :math:`p_{ij}` of the rows start to stop.

        Within one modality the softmax does not feel the bias, and the sink and the other modalities only scale it:

        .. math:: p_{ij} = \text{mass}_{i,a_j} \, e^{s_{ij}} \big/ \textstyle\sum_{j': a_{j'} = a_j} e^{s_{ij'}}

        over the visible keys, with :math:`s_{ij} = \text{scale}\ q_i^{(a_j)} \cdot k_j`, the scores without bias. So
        neither a large bias nor a split softmax costs accuracy. Block by block this gives what each key receives
        without an N x N matrix.

        Returns:
            (B, Hq, stop - start, Nk), in the dtype of ``mass``; 0 where row i does not see key j, as rows of padding.
        """
        rows = slice(*slice(start, stop).indices(self.query_modality.shape[1]))
        columns = torch.arange(self.key_modality.shape[1], device=self.key.device)
        weights = self.mass.new_zeros(())
        for m in range(self.num_modalities):
            shares, mass = self._shares(m, rows, columns)
            weights = weights + shares * mass[..., None]
        return weights

    def mass_on(self, chosen: Tensor, modality: int, start: int, keys: Tensor) -> Tensor:
        r"""The mass on some keys of one modality: the sum of their :meth:`weights`, at the cost of these columns.

        Args:
            chosen: (B, rows, K), bool: which of ``keys`` count for the rows start to start + rows.
            modality: m.
            keys: (K,), integer: columns, among them all of modality m. What they hold besides is not looked at.

        Returns:
            (B, Hq, rows), in the dtype of ``mass``.
        """
        rows = slice(start, start + chosen.shape[1])
        shares, mass = self._shares(modality, rows, keys)
        # Sequence by sequence: heads and rows then change places without a copy, which einsum would make.
        pairs = zip(shares, chosen.to(shares.dtype), strict=True)
        return mass * torch.stack([(e.transpose(0, 1) @ c[..., None])[..., 0].T for e, c in pairs])

    def mass_besides(self, chosen: Tensor, modality: int, start: int, keys: Tensor, rows: Tensor) -> Tensor | None:
        r"""The mass of a modality without that on some of its keys: a difference, at the cost of these keys alone.

        Args:
            chosen, modality, start: as in :meth:`mass_on`.
            keys: (K,), integer: columns, those that count for any row among them.
            rows: (B, rows), bool: the rows that matter. Others hold anything.

        Returns:
            (B, Hq, rows), in the dtype of ``mass``. None if the difference would be off by more than 1e-4 of itself in
            some row: where it is a small part of the mass, or :math:`|L_i|` is large (see :meth:`weight_of`). Finding
            that out waits for the device.
        """
        if self.lse is None:
            return None
        span = slice(start, start + chosen.shape[1])
        mass, lse = self.mass[:, :, span, modality], self.lse[:, :, span]
        scores = self._scores(modality, span, keys, rows, chosen)
        shift = -lse if self.bias is None else self._bias()[:, :, span, modality] - lse
        left = mass - (scores + shift[..., None]).exp().sum(dim=-1)
        exact = ~rows[:, None] | (mass * self._error(lse) <= ACCURACY * left)
        return left if bool(exact.all()) else None

    def weight_of(self, index: Tensor) -> Tensor:
        r"""The weight :math:`p_{ij} = e^{S_{ij} - L_i}` of one key j of each sequence, without the other keys' scores.

        Args:
            index: (B,), integer: the column of the key.

        Returns:
            (B, Hq, Nq), in the dtype of ``mass``; 0 where row i does not see key j. **NaN** where that cannot be told:
            if the softmax is split, and where :math:`|L_i|` is so large (beyond about 800 in float32, for instance by a
            bias common to all keys) that :math:`S - L` would be off by more than 1e-4.
        """
        index = index.long()
        modality = self.key_modality.gather(1, index[:, None]).clamp(min=0).long()  # (B, 1)
        place = modality[..., None, None].expand(*self.mass.shape[:3], 1)
        mass = self.mass.gather(-1, place).squeeze(-1)
        visible = self.sees(index)[:, None] & (mass > 0)
        if self.lse is None:
            return torch.where(visible, torch.nan, 0.0).to(mass.dtype)
        query, (batch, heads, _, size) = self.query, self.key.shape
        if query.dim() == 5:
            query = query[modality[:, 0], torch.arange(batch, device=query.device)]
        key = self.key.gather(2, index[:, None, None, None].expand(batch, heads, 1, size))[:, :, 0]
        key = key.repeat_interleave(query.shape[1] // heads, dim=1)  # head by head: a group's rows lie apart in memory
        score = self.scale * torch.einsum("bhnd,bhd->bhn", query.to(mass.dtype), key.to(mass.dtype))
        if self.bias is not None:
            score = score + self._bias().gather(-1, place).squeeze(-1)
        return torch.where(
            visible, torch.where(self._error(self.lse) <= ACCURACY, (score - self.lse).exp(), torch.nan), 0.0
        )

    def sees(self, index: Tensor) -> Tensor:
        """Which rows see one key of their sequence, in column ``index`` (B,): (B, Nq), bool."""
        rows, keys = self.query_modality.shape[1], self.key_modality.shape[1]
        present = self.key_modality.gather(1, index[:, None].long()) >= 0
        if self.visible is None:
            last = torch.arange(rows, device=index.device) + keys - rows
            return present & (last >= index[:, None])
        of_rows = self.visible[:, 0].expand(len(index), rows, -1)
        return present & of_rows.gather(2, index.long()[:, None, None].expand(-1, rows, 1))[..., 0]

    def _shares(self, modality: int, rows: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax within a modality, (B, Hq, rows, K), 0 for the keys of others, and the mass it shares out.

        A row without a visible key of the modality has a mass (B, Hq, rows) of 0 and any shares, none of them NaN.
        """
        present = self.query_modality[:, rows] >= 0
        shares = self._scores(modality, rows, columns, present).softmax(dim=-1)
        return shares, torch.where(present[:, None], self.mass[:, :, rows, modality], 0.0)

    def _bias(self) -> Tensor:
        assert self.bias is not None, "asked for where there is one"
        return self.bias.to(self.mass.dtype).expand_as(self.mass)

    @staticmethod
    def _error(lse: Tensor) -> Tensor:
        """How far a weight e^(S - lse) may be off, relative to itself."""
        return (1 + lse.abs()) * torch.finfo(lse.dtype).eps

    def _scores(
        self, modality: int, rows: slice, columns: Tensor, present: Tensor, chosen: Tensor | None = None
    ) -> Tensor:
        """Scores without bias of the keys of a modality, (B, Hq, rows, K); the lowest number where a row sees none.

        Neither rows that are not ``present`` (B, rows) are looked at, nor keys that are not ``chosen`` (B, rows, K).
        """
        members = self.key_modality.index_select(1, columns) == modality  # (B, K)
        shown = self._visible(members, rows, columns)
        shown = shown if chosen is None else shown & chosen[:, None]
        # What padding holds is set to 0, so that a mask can be added: a masked fill takes twice as long as the product.
        key = torch.where(members[:, None, :, None], self.key.index_select(2, columns), 0.0).to(self.mass.dtype)
        query = (self.query if self.query.dim() == 4 else self.query[modality])[:, :, rows]
        query = torch.where(present[:, None, :, None], query, 0.0).to(self.mass.dtype) * self.scale
        group, number = query.shape[1] // key.shape[1], query.shape[2]
        of_group = query.unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, group rows, D): no copies of the keys
        scores = (of_group @ key.mT).unflatten(2, (group, number)).flatten(1, 2)
        scores += torch.where(shown, 0.0, scores.new_full((), torch.finfo(scores.dtype).min))
        return scores

    def _visible(self, members: Tensor, rows: slice, columns: Tensor) -> Tensor:
        """(B, 1, rows, K), bool: which rows see which of the keys in ``columns`` that are ``members`` (B, K)."""
        queries, keys = self.query_modality.shape[1], self.key_modality.shape[1]
        members = members[:, None, None]
        if self.visible is not None:
            return members & self.visible.expand(-1, -1, queries, -1)[:, :, rows].index_select(3, columns)
        last = torch.arange(rows.start, rows.stop, device=columns.device) + keys - queries
        return members & (columns <= last[:, None])


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
