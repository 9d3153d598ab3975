"""Duplex attention of any aligner and mask on a cache in pages: what a layer of a serving engine calls."""

import torch
from torch import Tensor

from moda_ext._ops.limits import accumulation_dtype
from moda_ext.functional.alignment import low_rank_weights
from moda_ext.functional.paged import Pages, align_and_attend, attend, positions_of_rows
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.mask import ModularMask

__all__ = ["PagedAttention", "Pages", "Rows", "positions_of_rows"]


class Rows:
    """The rows of a step, the last tokens of their sequences, and what all layers want to know of them.

    Args:
        modality: (T,), int32, from 0.
        positions: (T,), the place of each row in its sequence, from 0; see :func:`positions_of_rows`.
    """

    def __init__(self, modality: Tensor, positions: Tensor):
        self.modality, self.positions = modality, positions
        # The modality of all rows, as decoded ones mostly have one; not where looking waits for a device.
        self.only: int | None = None
        if modality.is_cpu and len(modality) and bool((modality == modality[0]).all()):
            self.only = int(modality[0])
        self._up_to: dict[int, Tensor] = {}

    def positions_up_to(self, last: int) -> Tensor:
        if last not in self._up_to:
            self._up_to[last] = self.positions.clamp(max=last)
        return self._up_to[last]


class PagedAttention:
    """Causal duplex attention of one layer on pages. What no step changes is made once: a step of few tokens is over
    before the terms of a mask would be computed.

    Args:
        aligner, mask: the modules, which may both be missing; as they are now, without gradients. The aligner's scope
            is causal.
        num_modalities: M.
        scale: factor of the scores.
        dtype: of the query.
        max_positions: the most tokens of a sequence.
    """

    def __init__(
        self,
        aligner: DuplexAligner | None,
        mask: ModularMask | None,
        num_modalities: int,
        scale: float,
        dtype: torch.dtype,
        max_positions: int,
    ):
        self.mask, self.num_modalities, self.scale = mask, num_modalities, scale
        # (M, Hq, M), [modality of the row, head, modality of the key]; (positions, Hq), or (1, Hq) for all
        self.bias: Tensor | None = None
        self.condition: Tensor | None = None
        self.sink: Tensor | None = None
        self.weights: dict[str, Tensor] | None = None
        self._terms: tuple[tuple[int, int], Tensor | None, Tensor | None] | None = None
        with torch.no_grad():
            if aligner is not None:
                weights = aligner.low_rank()
                names = weights["a1"], weights["b1"], weights["a2"], weights["b2"]
                self.weights = low_rank_weights(names, accumulation_dtype(dtype))
                self.key_norm, self.normalize = aligner.key_norm, aligner.normalize
            if mask is not None:
                self._tabulate(mask, dtype, max_positions)

    def _tabulate(self, mask: ModularMask, dtype: torch.dtype, max_positions: int) -> None:
        device = next((t.device for t in mask.state_dict().values()), None)
        each = torch.arange(self.num_modalities, device=device)[:, None]  # a row of each modality, alone
        query = torch.zeros(self.num_modalities, mask.num_heads, 1, 8, dtype=dtype, device=device)
        bias, _, condition = mask(query, each, return_condition=True)
        self.bias = None if bias is None else bias.squeeze(2).contiguous()
        self.condition = None if condition is None else condition.squeeze(2).contiguous()
        # Beyond the last position of a mask with a length there is no pseudo score left, whatever the position.
        places = 1 if mask.length is None else 1 + min(mask.length, max_positions)
        row = torch.zeros(1, places, dtype=torch.int32, device=device)
        _, sink = mask(query[:1].expand(-1, -1, places, -1), row)
        if sink is not None:
            self.sink = sink.expand(1, mask.num_heads, places)[0].T.contiguous()

    def _terms_of(self, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
        """Bias and condition of the rows, (T, Hq, M). Those of rows of one modality are views, kept for the next step:
        after an operator has filled the caches, each small one of PyTorch's takes a twentieth of its time."""
        if rows.only is None:
            bias, condition = (
                t if t is None else t.index_select(0, rows.modality) for t in (self.bias, self.condition)
            )
            return bias, condition
        which = rows.only, len(rows.modality)
        if self._terms is None or self._terms[0] != which:
            bias, condition = (
                t if t is None else t[rows.only].expand(which[1], -1, -1) for t in (self.bias, self.condition)
            )
            self._terms = which, bias, condition
        return self._terms[1:]

    def __call__(self, query: Tensor, rows: Rows, pages: Pages) -> tuple[Tensor, Tensor]:
        """
        Args:
            query: (T, Hq, D), the last tokens of the sequences.
            rows: what they are.
            pages: keys, values and modalities of all tokens, those of the rows among them.

        Returns:
            ``out`` (T, Hq, D) and ``mass`` (T, Hq, M).
        """
        bias, condition = self._terms_of(rows)
        sink = self.sink
        if sink is not None and len(sink) > 1:
            sink = sink.index_select(0, rows.positions_up_to(len(sink) - 1))
        elif sink is not None:
            sink = sink.expand(query.shape[0], -1)

        def one(bias: Tensor | None) -> tuple[Tensor, Tensor]:
            if self.weights is None:
                options = {"modality_bias": bias, "sink": sink}
                out, _, mass = attend(query, pages, self.num_modalities, **options, scale=self.scale)
                return out, mass
            out, _, mass = align_and_attend(
                query,
                rows.modality,
                pages,
                self.weights,
                self.num_modalities,
                key_norm=self.key_norm,
                normalize=self.normalize,
                eps=1e-6,
                modality_bias=bias,
                condition=condition,
                sink=sink,
                scale=self.scale,
            )
            return out, mass

        if self.mask is None or self.mask.softmax == "joint":
            return one(bias)

        def sides(bias: Tensor | None) -> tuple[Tensor, ...]:  # (T, Hq, 1, M), every row a sequence of its own
            bias = None if bias is None else bias.expand(*query.shape[:2], 1, -1).squeeze(2)
            return tuple(result.unsqueeze(2) for result in one(bias))

        wide = None if bias is None else bias.unsqueeze(2)
        out, mass = self.mask.over_softmaxes(sides, query.unsqueeze(2), rows.modality.unsqueeze(1), wide)
        return out.squeeze(2), mass.squeeze(2)
