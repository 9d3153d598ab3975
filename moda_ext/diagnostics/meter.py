"""The meter: what a model's attention does, layer by layer, while the model runs."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor, nn

from moda_ext.diagnostics import measures
from moda_ext.diagnostics.attach import in_backward, recorded
from moda_ext.diagnostics.results import Diagnosis, LayerSums, TokenScores
from moda_ext.integrations.recording import AttentionRecord

__all__ = ["AttentionMeter"]

BLOCK_ELEMENTS = 1 << 22  # of the weights made at once for token scores: 16 MB in float32


class AttentionMeter:
    """Measures deficit disorder attention in a model, while the model does what it does.

    .. code-block:: python

        with AttentionMeter(model) as meter:
            for batch in batches:
                model(**batch)
        diagnosis = meter.result()

    The model is a Transformers vision-language model of a known family, plain or with MODA, or any module with
    :class:`moda_ext.attention.ModularDuplexAttention` layers. A plain model computes its attention through
    ``modular_attention`` while the meter is entered (the same result as ``sdpa`` within rounding) and its own way
    again afterwards. Sums are kept, never a matrix of all pairs; measuring costs a few small products for each layer.
    Entering again adds to what was measured; :meth:`reset` starts anew.

    Everything the model computes while the meter is entered counts: rows of prompts, and of decoding steps.

    Args:
        model: the model, on any device.
        name: what the results call it, by default its class name.
        modalities: the modality of each kind of token, from 0, as in
            :class:`moda_ext.integrations.transformers.MODAConfig`: ``{"text": 0, "image": 1, "video": 1}`` by default.
            A model with MODA has its own; for layers of this package it names their modalities.
        token_scores: for how many sequences to keep the weight that each token gets from the text
            (:class:`moda_ext.diagnostics.TokenScores`). Only whole prompts in one call count. This computes the scores
            of text rows once more, block by block.
        similarity: also measure attention collapse, the mean cosine similarity of two tokens at the output of every
            layer (:func:`moda_ext.diagnostics.measures.token_similarity`), averaged over sequences.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a negative number of sequences; on entering, a model of an unknown family.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        modalities: dict[str, int] | None = None,
        token_scores: int = 0,
        similarity: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"AttentionMeter: model must be a torch.nn.Module, got {type(model).__name__}")
        if token_scores < 0:
            raise ValueError(f"AttentionMeter: token_scores must be at least 0, got {token_scores}")
        self.model = model
        self.name = type(model).__name__ if name is None else name
        self.modalities = modalities
        self._names: dict[str, int] | None = modalities
        self.token_scores, self.similarity = token_scores, similarity
        self._context: contextlib.ExitStack | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything measured."""
        self._sums: dict[int, LayerSums] = {}
        self._similarity: dict[int, list[Tensor]] = {}
        self._scores: dict[int, list[Tensor]] = {}  # for each layer, of each kept sequence
        self._scored: list[tuple[Tensor, Tensor]] = []  # modality and uniform scores of each kept sequence
        self._sequences: int | Tensor = 0
        self._end_pass()

    def _end_pass(self) -> None:
        self._call: _Call | None = None
        self._layer: int | None = None  # the last one that was recorded
        self._scoring: list[int] = []  # the sequences of this forward pass whose token scores are kept

    def __enter__(self) -> AttentionMeter:
        if self._context is not None:
            raise RuntimeError("AttentionMeter: entered already")
        with contextlib.ExitStack() as stack:
            blocks, self._names = stack.enter_context(recorded(self.model, self, self.modalities))
            if self.similarity:
                for index, block in blocks.items():
                    stack.callback(block.register_forward_hook(self._hidden_hook(index)).remove)
            self._context = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        context, self._context = self._context, None
        self._end_pass()
        context.close()

    @torch.no_grad()
    def __call__(self, record: AttentionRecord) -> None:
        """Adds one attention call. The recorder of a layer; there is no need to call it by hand."""
        if in_backward():
            return
        with torch.autocast(record.mass.device.type, enabled=False):
            begins = self._layer is None or record.layer <= self._layer
            if begins or not self._call.is_over_the_tokens_of(record):
                self._call = _Call(record)
            if begins:
                self._begin(self._call)
            call, self._layer = self._call, record.layer
            if record.layer not in self._sums:
                self._sums[record.layer] = LayerSums(0, 0, 0, 0)
            sums = self._sums[record.layer]
            sums.flow += call.flow(record)
            sums.null += call.null
            sums.pairs += call.pairs
            sums.rows += call.rows
            if self._scoring:
                received = call.text_looks_at(record)
                self._scores.setdefault(record.layer, []).extend(received[b] for b in self._scoring)

    def callback(self, every: int = 100):
        """A ``transformers.TrainerCallback`` that measures one training step of every ``every``, the first included.

        Its attribute ``history`` is a list of (global step, :class:`moda_ext.diagnostics.Diagnosis`). What this meter
        measured before is forgotten at each of these steps.

        Raises:
            ValueError: ``every`` is not positive.
            ImportError: transformers is not installed.

        Example:
            >>> watch = AttentionMeter(model).callback(every=50)
            >>> Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
            >>> [(step, diagnosis.summary()["avg_diff"]) for step, diagnosis in watch.history]
        """
        if every < 1:
            raise ValueError(f"AttentionMeter.callback: every must be at least 1, got {every}")
        from transformers import TrainerCallback

        meter = self

        class MeterCallback(TrainerCallback):
            def __init__(self):
                self.history: list[tuple[int, Diagnosis]] = []

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step % every == 0:
                    meter.reset()
                    meter.__enter__()

            def on_step_end(self, args, state, control, **kwargs):
                if meter._context is not None:
                    meter.__exit__()
                    self.history.append((state.global_step, meter.result()))

        return MeterCallback()

    @property
    def num_scored(self) -> int:
        """Of how many sequences there are token scores."""
        return len(self._scored)

    def result(self) -> Diagnosis:
        """What was measured until now.

        Raises:
            RuntimeError: nothing was measured.
        """
        if not self._sums:
            raise RuntimeError(
                "AttentionMeter: nothing was measured; run the model inside `with AttentionMeter(model) as meter:`"
            )
        layers = sorted(self._sums)
        sums = [
            LayerSums(*(getattr(self._sums[i], field.name).cpu().clone() for field in dataclasses.fields(LayerSums)))
            for i in layers
        ]
        names = _modality_names(self._names, sums[0].rows.shape[-1])
        similarity = None
        if self.similarity:
            values = [torch.cat(self._similarity[i]).double().cpu() for i in layers]
            similarity = torch.stack([v[~v.isnan()].mean() for v in values])
        scores = [
            TokenScores(modality.cpu(), torch.stack([self._scores[i][k].float().cpu() for i in layers]), uniform.cpu())
            for k, (modality, uniform) in enumerate(self._scored)
        ]
        return Diagnosis(self.name, names, tuple(layers), sums, int(self._sequences), similarity, scores)

    def _hidden_hook(self, index: int):
        """A forward hook of the block around layer ``index``, whose output is (B, N, E) or a tuple that begins so."""

        @torch.no_grad()
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] > 1 and not in_backward():  # no decoding step
                similarity = measures.token_similarity(hidden, self._call.query_modality >= 0)
                self._similarity.setdefault(index, []).append(similarity)

        return hook

    def _begin(self, call: _Call) -> None:
        """Counts the sequences that a call begins, and chooses those whose token scores are kept."""
        valid_rows, valid_keys = ((t >= 0).sum(dim=1) for t in (call.query_modality, call.key_modality))
        self._sequences = self._sequences + ((valid_rows == valid_keys) & (valid_rows > 0)).sum()
        self._scoring = []
        room = self.token_scores - len(self._scored)
        if room > 0 and call.query_modality.shape == call.key_modality.shape:
            self._scoring = call.text_rows.any(dim=1).nonzero()[:room, 0].tolist()
            uniform = call.uniform_looks_at()
            self._scored += [(call.key_modality[b].clone(), uniform[b]) for b in self._scoring]


class _Call:
    """What the layers have in common in one forward pass: which row sees what."""

    def __init__(self, record: AttentionRecord):
        self.query_modality, self.key_modality, self.visible = (
            record.query_modality,
            record.key_modality,
            record.visible,
        )
        self.num_modalities = record.num_modalities
        self.counts = record.key_counts()
        see_all = measures.rows_that_see_all(self.counts, self.key_modality)
        self.text_rows = see_all & (self.query_modality == 0)
        choices = [measures.choose_rows(self.query_modality, self.num_modalities, rows) for rows in (None, see_all)]
        self.chosen = torch.cat(choices, dim=-1).to(record.mass.dtype)  # (B, N, 2 M)

        self.first = (self.key_modality >= 0).int().argmax(dim=1)  # the first token of each sequence
        self.first_modality = self.key_modality.gather(1, self.first[:, None].long())  # (B, 1)
        self.sees_first = self._sees_first()
        modalities = torch.arange(self.num_modalities, device=self.first.device)
        self.is_of_first = self.first_modality[..., None] == modalities  # (B, 1, M)
        others = self.counts - (self.is_of_first & self.sees_first[..., None]).long()
        counts = torch.stack([self.counts, others], dim=1).double()  # (B, 2, N, M), with and without the first token
        self.pairs = self._sum(counts)
        self.null = self._sum(measures.uniform_mass(counts))
        self.rows = self._sum((counts.sum(dim=-1, keepdim=True) > 0).double())[..., 0]

    def is_over_the_tokens_of(self, record: AttentionRecord) -> bool:
        """Compares memory, not contents, which would cost a synchronisation. Good within one forward pass only.

        In the next, a static cache may have written other modalities into the same memory.
        """
        return all(
            _same_memory(getattr(record, name), getattr(self, name))
            for name in ("query_modality", "key_modality", "visible")
        )

    def flow(self, record: AttentionRecord) -> Tensor:
        """(2, 2, H, M, M), float64."""
        if record.lse is None:
            of_first = torch.full_like(record.mass, torch.nan)
        else:
            # The weight of one key: the record of a call with no other keys, and the softmax of the whole call.
            index = self.first.long()[:, None, None, None]
            only_first = dataclasses.replace(
                record,
                key=record.key.gather(2, index.expand(-1, record.key.shape[1], 1, record.key.shape[3])),
                key_modality=self.first_modality,
                visible=self.sees_first[:, None, :, None],
            )
            of_first = only_first.weights() * self.is_of_first[:, None]
        both = torch.stack([record.mass, record.mass - of_first], dim=1)  # (B, 2, H, N, M)
        return self._sum(both).double()

    def text_looks_at(self, record: AttentionRecord) -> Tensor:
        """(B, Nk): the weight that each key gets from a text row, mean over heads and chosen text rows."""
        batch, heads, rows = record.mass.shape[:3]
        received = record.mass.new_zeros(batch, self.key_modality.shape[1])
        block = max(1, BLOCK_ELEMENTS // (batch * heads * received.shape[1]))
        some = self.text_rows.any(dim=0).tolist()
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            if any(some[start:stop]):
                weights = record.weights(start, stop)
                received += torch.einsum("bhij,bi->bj", weights, self.text_rows[:, start:stop].to(weights.dtype))
        return received / (heads * self.text_rows.sum(dim=1, keepdim=True).clamp(min=1))

    def uniform_looks_at(self) -> Tensor:
        """(B, Nk): the same for uniform attention."""
        share = self.text_rows / self.counts.sum(dim=-1).clamp(min=1)  # (B, N), of each visible key
        share = share / self.text_rows.sum(dim=1, keepdim=True).clamp(min=1)
        if self.visible is None:
            received = share.flip(1).cumsum(dim=1).flip(1)
        else:
            visible = self.visible[:, 0].expand(-1, share.shape[1], -1)
            received = (share[:, None] @ visible.to(share.dtype))[:, 0]
        return received * (self.key_modality >= 0)

    def _sum(self, values: Tensor) -> Tensor:
        """(B, 2, ..., N, K) -> (2, 2, ..., M, K): over the rows of each choice."""
        sums = measures.sum_rows(values, self.chosen)  # (2, ..., 2 M, K)
        return sums.unflatten(-2, (2, self.num_modalities)).movedim(-3, 0)

    def _sees_first(self) -> Tensor:
        """(B, N), bool."""
        rows, keys = self.query_modality.shape[1], self.key_modality.shape[1]
        if self.visible is None:
            last = torch.arange(rows, device=self.first.device) + keys - rows
            seen = last >= self.first[:, None]
        else:
            index = self.first.long()[:, None, None].expand(-1, rows, 1)
            seen = self.visible[:, 0].expand(len(index), rows, -1).gather(2, index)[..., 0]
        return seen & (self.first_modality >= 0)


def _modality_names(numbers: dict[str, int] | None, count: int) -> tuple[str, ...]:
    """A name for each modality: its kinds of token, or its number."""
    if numbers is None:
        return ("text", *("vision" if count == 2 else f"modality {m}" for m in range(1, count)))
    kinds = [[kind for kind, number in numbers.items() if number == m] for m in range(count)]
    if max(numbers.values()) >= count or not all(kinds):
        raise ValueError(f"AttentionMeter: modalities must number the model's {count} modalities from 0, got {numbers}")
    return tuple("vision" if kind == ["image", "video"] else "/".join(kind) for kind in kinds)


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
