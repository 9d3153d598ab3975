"""Duplex attention of any aligner and mask on a cache in pages: what a layer of a serving engine calls."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moda_ext._ops import backend
from moda_ext._ops.limits import accumulation_dtype
from moda_ext.functional.alignment import low_rank_weights
from moda_ext.functional.paged import NewTokens, Pages, StepTerms, step
from moda_ext.nn.aligner import DuplexAligner
from moda_ext.nn.mask import ModularMask

__all__ = ["PagedAttention", "Pages", "Rows"]


class Rows:
    """The rows of a step, the last tokens of their sequences, and what all layers want to know of them.

    Args:
        modality: (T,), int32, from 0.
        slot_mapping: (T,), int64: their cells, see :func:`moda_ext.attention.paged_cache_update`.
    """

    def __init__(self, modality: Tensor, slot_mapping: Tensor):
        self.modality, self.slot_mapping = modality, slot_mapping
        self.chosen: str | None = None  # the backend: the layers of a step differ in nothing that it depends on


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
        self.mask = mask
        settings: dict[str, Any] = {"num_modalities": num_modalities, "scale": scale}
        with torch.no_grad():
            if aligner is not None:
                weights = aligner.low_rank()
                names = weights["a1"], weights["b1"], weights["a2"], weights["b2"]
                settings["weights"] = low_rank_weights(names, accumulation_dtype(dtype))
                settings |= {"key_norm": aligner.key_norm, "normalize": aligner.normalize}
            if mask is not None:
                settings |= self._tabulate(mask, num_modalities, dtype, max_positions)
        self.terms = StepTerms(**settings)

    def _tabulate(
        self, mask: ModularMask, num_modalities: int, dtype: torch.dtype, max_positions: int
    ) -> dict[str, Tensor | None]:
        device = next((t.device for t in mask.state_dict().values()), None)
        self.each = each = torch.arange(num_modalities, device=device)[:, None]  # a row of each modality, alone
        query = torch.zeros(num_modalities, mask.num_heads, 1, 8, dtype=dtype, device=device)
        bias, _, condition = mask(query, each, return_condition=True)
        bias, condition = (None if t is None else t.squeeze(2).contiguous() for t in (bias, condition))
        # Beyond the last position of a mask with a length there is no pseudo score left, whatever the position.
        places = 1 if mask.length is None else 1 + min(mask.length, max_positions)
        row = torch.zeros(1, places, dtype=torch.int32, device=device)
        _, sink = mask(query[:1].expand(-1, -1, places, -1), row)
        if sink is not None:
            sink = sink.expand(1, mask.num_heads, places)[0].T.contiguous()
        return {"modality_bias": bias, "condition": condition, "sink": sink}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Rows, pages: Pages, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Writes the tokens of the rows into the pages, and attends.

        Args:
            query: (T, Hq, D), the last tokens of the sequences.
            key, value: (T, Hkv, D), theirs.
            rows: what they are.
            pages: keys, values and modalities of the other tokens; **updated in place**.
            out: (T, Hq, D), where the result is **written**, None for a tensor of its own.

        Returns:
            ``out`` and ``mass`` (T, Hq, M).
        """
        tokens = NewTokens(key, value, rows.modality, rows.slot_mapping)
        if out is None:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if rows.chosen is None:
            rows.chosen = backend.choose("paged_attention_step", query, pages.kv_cache, *self.terms.tensors)
        if self.mask is None or self.mask.softmax == "joint":
            return out, step(query, tokens, pages, self.terms, out, rows.chosen)

        def side(bias: Tensor) -> tuple[Tensor, Tensor]:  # (T, Hq, 1, M), every row a sequence of its own
            bias = bias.expand(-1, query.shape[1], -1, -1).squeeze(2)
            result = torch.empty_like(out)
            terms = dataclasses.replace(self.terms, modality_bias=bias)
            mass = step(query, tokens, pages, terms, result, rows.chosen)
            return result.unsqueeze(2), mass.unsqueeze(2)

        bias = self.terms.modality_bias
        wide = None if bias is None else bias.unsqueeze(2)
        result, mass = self.mask.over_softmaxes(side, query.unsqueeze(2), self.each, wide)
        return out.copy_(result.squeeze(2)), mass.squeeze(2)
