"""The meter: what a model's attention does, layer by layer, while the model runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from moda_ext.diagnostics import measures
from moda_ext.diagnostics.attach import all_heads, in_backward, mean_over_heads, recorded
from moda_ext.diagnostics.results import ROWS, Diagnosis, LayerSums, TokenScores
from moda_ext.integrations.recording import AttentionRecord
from moda_ext.integrations.settings import modality_names

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["AttentionMeter"]

BLOCK_ELEMENTS = 1 << 20  # of the weights made at once: 4 MB in float32, a few times
GENERATED = ROWS.index("generated")


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

    Everything the model computes while the meter is entered counts: rows of prompts, and of decoding steps. Of a
    tensor-parallel model every process must enter a meter: it measures the heads of all of them.

    **Generated tokens.** The figures of ``rows="generated"`` (:meth:`moda_ext.diagnostics.Diagnosis.figure`) are about
    rows of generated tokens and keys of their prompt. Where the prompt ends is known

    - while decoding: the first forward pass over a sequence is its prompt, what comes after it, token by token, is
      generated. The last token that ``generate`` makes has no row: it is not fed back. After a token in
      ``model.generation_config.eos_token_id`` a sequence of a batch is over, and the rows that fill it up do not count
      (an end that only ``generate`` is told, by its arguments, is not seen). The rows of every hypothesis of a beam
      search count, also of those that are dropped;
    - with labels (a keyword argument of the model's ``forward``, (B, N)): a run of tokens that have one (not negative)
      is an answer, and all before it its prompt. So a data set is measured in one pass over prompt and answer, which
      also costs less than decoding;
    - where it is said: :meth:`generated_after`. It goes before the two others.

    Everything else, such as several tokens at once after the first pass (a prompt in chunks, the next turn of a
    conversation, drafts of assisted decoding) or labels on the prompt too, has no border that can be told: then all
    figures of ``rows="generated"`` are NaN, and ``undefined()`` of the result says why. A prompt in chunks of which the
    second and last has one token cannot be told from a generated token: say where it ends.

    Args:
        model: the model, on any device.
        name: what the results call it, by default its class name.
        modalities: the modality of each kind of token, from 0, as in
            :class:`moda_ext.integrations.transformers.MODAConfig`: ``{"text": 0, "image": 1, "video": 1}`` by default.
            A model with MODA has its own; for layers of this package it names their modalities.
        token_scores: for how many sequences to keep the weight that each token gets from the text
            (:class:`moda_ext.diagnostics.TokenScores`). Only whole prompts in one call count. This computes the scores
            of text rows once more, block by block.
        score_rows: which text rows those scores are of: ``"both"``, those that see every modality of the sequence, or
            ``"generated"``, those of generated tokens, with a prompt and its answer in one call.
        similarity: also measure attention collapse, the mean cosine similarity of two tokens at the output of every
            layer (:func:`moda_ext.diagnostics.measures.token_similarity`), averaged over sequences.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a negative number of sequences, or other rows; on entering, a model of an unknown family.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        modalities: dict[str, int] | None = None,
        token_scores: int = 0,
        score_rows: str = "both",
        similarity: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"AttentionMeter: model must be a torch.nn.Module, got {type(model).__name__}")
        if token_scores < 0:
            raise ValueError(f"AttentionMeter: token_scores must be at least 0, got {token_scores}")
        if score_rows not in ("both", "generated"):
            raise ValueError(f"AttentionMeter: score_rows must be 'both' or 'generated', got {score_rows!r}")
        self.model = model
        self.name = type(model).__name__ if name is None else name
        self.modalities = modalities
        self._names: dict[str, int] | None = modalities
        self.token_scores, self.score_rows, self.similarity = token_scores, score_rows, similarity
        self._context: contextlib.ExitStack | None = None
        self._prompts = _Prompts()
        self.reset()

    def reset(self) -> None:
        """Forgets everything measured."""
        self._sums: dict[int, LayerSums] = {}
        self._similarity: dict[int, list[Tensor]] = {}
        self._scores: dict[int, list[Tensor]] = {}  # for each layer, of each kept sequence
        self._uniform: dict[int, list[Tensor]] = {}  # the same of uniform attention
        self._scored: list[Tensor] = []  # the modalities of each kept sequence
        self._settled = 0  # how many of them are not of the pass that is going on
        self._sequences: int | Tensor = 0
        self._prompts.reset()
        self._end_pass()

    def _end_pass(self) -> None:
        self._prompts.end_pass()
        self._settle()
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
            model = _transformers_model(self.model)
            stack.callback(model.register_forward_pre_hook(self._prompts.look_at, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(self._prompts.look_away, always_call=True).remove)
            self._context = stack.pop_all()
        self._prompts.begin_anew()
        return self

    def __exit__(self, *error: object) -> None:
        context, self._context = self._context, None
        self._end_pass()
        assert context is not None, "entered"
        context.close()

    @torch.no_grad()
    def __call__(self, record: AttentionRecord) -> None:
        """Adds one attention call. The recorder of a layer; there is no need to call it by hand."""
        if in_backward():
            return
        with torch.autocast(record.mass.device.type, enabled=False):
            begins = self._layer is None or record.layer <= self._layer
            if begins:
                self._prompts.end_pass()
            call = self._call
            if begins or call is None or not call.is_over_the_tokens_of(record):
                call = self._call = _Call(record, self._prompts.borders(record), self.score_rows)
            if begins:
                self._begin(call)
            self._prompts.check_window(record)
            self._layer = record.layer
            flow = all_heads(call.flow(record), record.mesh, dim=2)
            sums = self._sums.get(record.layer)
            if sums is None:
                self._sums[record.layer] = LayerSums(flow, call.null.clone(), call.pairs.clone(), call.rows.clone())
            else:
                sums.flow += flow
                sums.null += call.null
                sums.pairs += call.pairs
                sums.rows += call.rows
            if self._scoring:
                received = mean_over_heads(call.text_looks_at(record), record.mesh)
                self._scores.setdefault(record.layer, []).extend(received[b] for b in self._scoring)
                self._uniform.setdefault(record.layer, []).extend(call.uniform_looks_at[b] for b in self._scoring)

    @contextlib.contextmanager
    def generated_after(self, prompt_length: int | Tensor) -> Iterator[None]:
        """Says where the prompts end of what the model computes in this block: later tokens count as generated.

        .. code-block:: python

            with meter, meter.generated_after(inputs["attention_mask"].sum(dim=1)):
                model.generate(**inputs, prefill_chunk_size=256)

        Args:
            prompt_length: how many tokens each prompt has **without padding**, placeholders of images included: (B,),
                integer, or a number for all of a batch that has no padding. The sequences that ``generate`` makes of
                one prompt (beams, ``num_return_sequences``) share its number.

        Raises:
            ValueError: a number that is not positive; in the block, a batch of another size, or padding with one number
                for all.
        """
        if bool((torch.as_tensor(prompt_length) < 1).any()):
            raise ValueError(f"AttentionMeter.generated_after: prompt_length must be at least 1, got {prompt_length}")
        before = self._prompts.stated
        self._prompts.say(prompt_length)
        try:
            yield
        finally:
            self._prompts.end_pass()
            self._prompts.say(before)

    def callback(self, every: int = 100) -> TrainerCallback:
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
            def __init__(self) -> None:
                self.history: list[tuple[int, Diagnosis]] = []

            def on_step_begin(
                self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
            ) -> None:
                if state.global_step % every == 0:
                    meter.reset()
                    meter.__enter__()

            def on_step_end(
                self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
            ) -> None:
                if meter._context is not None:
                    meter.__exit__()
                    self.history.append((state.global_step, meter.result()))

        return MeterCallback()

    @property
    def num_scored(self) -> int:
        """Of how many sequences there are token scores, of passes that are over."""
        self._settle()
        return self._settled

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
        self._prompts.end_pass()
        self._settle()
        unclear, short = self._prompts.unclear_borders(), self._prompts.short_layers()
        for index, layer in zip(layers, sums, strict=True):
            if unclear or index in short:
                layer.flow[GENERATED], layer.null[GENERATED] = torch.nan, torch.nan
        if short:
            unclear.append(
                f"Layers {', '.join(map(str, short))} have a sliding window and no longer hold the keys of the whole "
                "prompt: their figures of generated rows are not defined."
            )
        names = _modality_names(self._names, sums[0].rows.shape[-1])
        similarity = None
        if self.similarity:
            values = [torch.cat(self._similarity[i]).double().cpu() for i in layers]
            similarity = torch.stack([v[~v.isnan()].mean() for v in values])
        scores = [
            TokenScores(
                modality.cpu(),
                torch.stack([self._scores[i][k].float().cpu() for i in layers]),
                torch.stack([self._uniform[i][k].float().cpu() for i in layers]).mean(dim=0),
            )
            for k, modality in enumerate(self._scored)
        ]
        return Diagnosis(self.name, names, tuple(layers), sums, int(self._sequences), similarity, scores, unclear)

    def _hidden_hook(self, index: int) -> Callable[[nn.Module, tuple, Any], None]:
        """A forward hook of the block around layer ``index``, whose output is (B, N, E) or a tuple that begins so."""

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] > 1 and not in_backward():  # no decoding step
                assert self._call is not None, "recorded inside of the block"
                similarity = measures.token_similarity(hidden, self._call.query_modality >= 0)
                self._similarity.setdefault(index, []).append(similarity)

        return hook

    def _begin(self, call: _Call) -> None:
        """Counts the sequences that a call begins, and chooses those whose token scores are kept."""
        valid_rows, valid_keys = ((t >= 0).sum(dim=1) for t in (call.query_modality, call.key_modality))
        self._sequences = self._sequences + ((valid_rows == valid_keys) & (valid_rows > 0)).sum()
        self._settle()
        self._scoring = []
        room = self.token_scores - self._settled
        if room > 0 and call.query_modality.shape == call.key_modality.shape:
            self._scoring = call.may_have_text_rows().nonzero()[:room, 0].tolist()
            self._scored += [call.key_modality[b].clone() for b in self._scoring]

    def _settle(self) -> None:
        """Of the last pass, keeps the sequences that have a text row in some layer; of one broken off, none."""
        new = range(self._settled, len(self._scored))
        if new:
            whole = all(len(scores) == len(self._scored) for scores in self._scores.values())
            kept = [k for k in new if whole and any(bool(u[k].any()) for u in self._uniform.values())]
            kept = [*range(self._settled), *kept]
            self._scored = [self._scored[k] for k in kept]
            for of_layers in (self._scores, self._uniform):
                for layer, scores in of_layers.items():
                    of_layers[layer] = [scores[k] for k in kept]
        self._settled = len(self._scored)


class _Prompts:
    """Where the prompt of each token ends, found out pass by pass. Tokens are counted without padding.

    Doubts are flags on the device, so that a pass need not wait for it.
    """

    SEVERAL = (
        "several tokens came at once after the first pass over a sequence (a prompt in chunks, the next turn of a "
        "conversation, assisted decoding)"
    )
    UNSEEN = "a sequence began before the meter was entered, in a cache of its own"
    NOT_TEXT = "a token that is not text came after the first pass over a sequence"
    TAKEN_BACK = (
        "tokens were taken back while decoding (drafts of assisted decoding), several generations took turns, or a "
        "sliding window dropped keys"
    )
    NO_PROMPT = "labels began with the first token of a sequence: they do not tell the answer from the prompt"
    CONTINUED = "labels came with a cache that held tokens before them"
    REMEDIES = {
        TAKEN_BACK: "run the model once more over the finished sequences, in one pass, inside of "
        "meter.generated_after(prompt_length)"
    }

    def __init__(self) -> None:
        self.stated: int | Tensor | None = None
        self.eos: Tensor | None = None
        self.look_away()
        self.reset()

    def reset(self) -> None:
        """Forgets everything about the data, but not what the user says."""
        self.flags: dict[str, Tensor] = {}
        self.short: dict[int, Tensor] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets the sequences that were going on."""
        self._length: Tensor | None = None  # (B,), tokens of each sequence's first pass, -1 if it was not seen
        self._seen: Tensor | None = None  # (B,), tokens after the last pass
        self._most: Tensor | None = None  # (B,), tokens that a layer of this pass held, the most
        self._new: Tensor | None = None  # (B,), tokens of this pass
        self._ended: Tensor | None = None  # (B,), bool: the end of the sequence came
        self._ending: Tensor | None = None  # the same after this pass
        self._held: dict[int, Tensor] = {}  # by layer

    def say(self, prompt_length: int | Tensor | None) -> None:
        self.stated = prompt_length
        self.begin_anew()

    def look_at(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model: token ids and labels of this pass."""
        self.token_ids, self.labels = args[0] if args else kwargs.get("input_ids"), kwargs.get("labels")
        eos = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
        self.eos = None if eos is None else torch.as_tensor(eos)

    def look_away(self, *ignored: object) -> None:
        """The forward hook after it."""
        self.token_ids = self.labels = None

    def borders(self, record: AttentionRecord) -> Tensor | None:
        """(B, Nq): the length of the prompt of each generated token, 0 for all other rows; None: there are none."""
        modality = record.query_modality
        valid = modality >= 0
        new, seen = valid.sum(dim=1), (record.key_modality >= 0).sum(dim=1)
        before = seen - new
        place = before[:, None] + valid.cumsum(dim=1) - 1  # of each row, in its sequence
        if self._length is None or self._ended is None or self._length.shape != new.shape:
            self.begin_anew()
            self._length, self._ended = torch.full_like(new, -1), torch.zeros_like(new, dtype=torch.bool)
        starts, length = before == 0, self._length.to(new.device)  # layers may be on several devices
        self._length = torch.where(starts, new, length)
        self._new, self._most = new, seen if self._most is None else torch.maximum(self._most.to(seen.device), seen)
        self._ended = self._ended.to(new.device) & ~starts

        if self.stated is not None:
            borders = self._stated_borders(valid, place)
        elif _is_over(self.labels, modality):
            return self._borders_of_labels(self.labels, valid, place, starts)
        elif modality.shape[1] == record.key_modality.shape[1]:
            return None  # the first pass
        else:
            generated = valid & (place >= self._length[:, None]) & ~starts[:, None]
            borders = torch.where(generated, self._length[:, None], 0)
            self._flag(self.SEVERAL, ~starts & (new > 1))
            self._flag(self.UNSEEN, ~starts & (length < 0))
            self._flag(self.NOT_TEXT, generated & (modality > 0))
        if self.eos is not None and _is_over(self.token_ids, modality):
            ends = torch.isin(self.token_ids.to(modality.device), self.eos.to(modality.device)) & (borders > 0)
            ended = self._ended[:, None] | (ends.cumsum(dim=1) > ends.long())
            self._ending = self._ended | ends.any(dim=1)
            borders = borders.masked_fill(ended, 0)
        return borders

    def check_window(self, record: AttentionRecord) -> None:
        """Notes a layer that may hold fewer keys than others."""
        if record.visible is not None and record.query_modality.shape[1] != record.key_modality.shape[1]:
            self._held[record.layer] = (record.key_modality >= 0).sum(dim=1)

    def end_pass(self) -> None:
        """Compares what the layers of the pass held with one another and with the passes before."""
        if self._most is None or self._new is None:
            return
        for layer, held in self._held.items():
            self.short[layer] = self.short.get(layer, False) | (held < self._most.to(held.device)).any()
        before = self._most - self._new.to(self._most.device)
        if self._seen is not None:
            self._flag(self.TAKEN_BACK, (before > 0) & (before != self._seen.to(before.device)))
        self._seen, self._most, self._held = self._most, None, {}
        self._ended, self._ending = self._ended if self._ending is None else self._ending, None

    def unclear_borders(self) -> list[str]:
        return [
            f"Where the prompts end is unclear: {reason}. No figure of generated rows is defined; "
            f"{self.REMEDIES.get(reason, 'say it with meter.generated_after(prompt_length)')}."
            for reason, flag in self.flags.items()
            if flag
        ]

    def short_layers(self) -> list[int]:
        return sorted(layer for layer, flag in self.short.items() if flag)

    def _stated_borders(self, valid: Tensor, place: Tensor) -> Tensor:
        length = torch.as_tensor(self.stated, device=place.device)
        if length.dim() == 0 and not bool(valid.all()):
            raise ValueError(
                "AttentionMeter.generated_after: prompt_length must be a tensor (B,) of lengths without padding for a "
                f"batch with padding, got {self.stated}"
            )
        if length.dim() == 1 and len(valid) % max(len(length), 1) == 0 and len(length):
            length = length.repeat_interleave(len(valid) // len(length))
        if length.shape not in ((), (len(valid),)):
            raise ValueError(
                f"AttentionMeter.generated_after: prompt_length must have one number for each of the {len(valid)} "
                f"sequences, got shape {tuple(length.shape)}"
            )
        length = length.reshape(-1, 1).long()
        return torch.where(valid & (place >= length), length, 0)

    def _borders_of_labels(self, labels: Tensor, valid: Tensor, place: Tensor, starts: Tensor) -> Tensor:
        answer = (labels.to(place.device) >= 0) & valid
        begins = answer & ~torch.nn.functional.pad(answer, (1, 0))[:, :-1]
        self._flag(self.NO_PROMPT, answer & (place == 0))
        self._flag(self.CONTINUED, answer & ~starts[:, None])
        return torch.where(answer, torch.where(begins, place, 0).cummax(dim=1).values, 0)

    def _flag(self, reason: str, where: Tensor) -> None:
        self.flags[reason] = where.any() | self.flags.get(reason, where.new_zeros(())).to(where.device)


class _Call:
    """What the layers have in common in one forward pass: which row sees what."""

    def __init__(self, record: AttentionRecord, borders: Tensor | None, score_rows: str):
        self.score_rows = score_rows
        self.query_modality, self.key_modality, self.visible = (
            record.query_modality,
            record.key_modality,
            record.visible,
        )
        self.num_modalities = record.num_modalities
        self.counts = record.key_counts()
        see_all = measures.rows_that_see_all(self.counts, self.key_modality)
        scored = see_all
        if score_rows == "generated":
            scored = torch.zeros_like(see_all) if borders is None else borders > 0
        self.text_rows = scored & (self.query_modality == 0)
        choices = [measures.choose_rows(self.query_modality, self.num_modalities, rows) for rows in (None, see_all)]
        self.chosen = torch.cat(choices, dim=-1).to(record.mass.dtype)  # (B, N, 2 M)

        self.first = (self.key_modality >= 0).int().argmax(dim=1)  # the first token of each sequence
        first_modality = self.key_modality.gather(1, self.first[:, None].long())  # (B, 1)
        self.sees_first = record.sees(self.first)
        modalities = torch.arange(self.num_modalities, device=self.first.device)
        self.is_of_first = first_modality[..., None] == modalities  # (B, 1, M)
        counts = self._with_and_without_first(self.counts, slice(None))
        self.pairs = self._sum(counts)
        self.null = self._sum(measures.uniform_mass(counts))
        self.rows = self._sum((counts.sum(dim=-1, keepdim=True) > 0).double())[..., 0]
        self.generated = None
        if borders is not None:
            self.generated = _GeneratedRows.of(self, borders)
        none = torch.zeros_like(self.pairs[:1]), torch.zeros_like(self.rows[:1])
        pairs, null, rows = (none[0], none[0], none[1]) if self.generated is None else self.generated.sums()
        self.pairs, self.null = torch.cat([self.pairs, pairs]), torch.cat([self.null, null])
        self.rows = torch.cat([self.rows, rows])

    def is_over_the_tokens_of(self, record: AttentionRecord) -> bool:
        """Compares memory, not contents, which would cost a synchronisation. Good within one forward pass only.

        In the next, a static cache may have written other modalities into the same memory.
        """
        return all(
            _same_memory(getattr(record, name), getattr(self, name))
            for name in ("query_modality", "key_modality", "visible")
        )

    def flow(self, record: AttentionRecord) -> Tensor:
        """(3, 2, H, M, M), float64."""
        of_first = torch.where(self.is_of_first[:, None], record.weight_of(self.first)[..., None], 0.0)
        both = torch.stack([record.mass, record.mass - of_first], dim=1)  # (B, 2, H, N, M)
        flow = self._sum(both)
        generated = torch.zeros_like(flow[:1]) if self.generated is None else self.generated.flow(record, of_first)
        return torch.cat([flow, generated]).double()

    def text_looks_at(self, record: AttentionRecord) -> Tensor:
        """(B, Nk): the weight that each key gets from a text row, mean over heads and chosen text rows."""
        batch, heads, rows = record.mass.shape[:3]
        received = record.mass.new_zeros(batch, self.key_modality.shape[1])
        block = max(1, BLOCK_ELEMENTS // (batch * heads * received.shape[1]))
        some = self.text_rows.any(dim=0).tolist()
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            if any(some[start:stop]):
                chosen = self.text_rows[:, start:stop]
                weights = record.weights(start, stop).masked_fill(~chosen[:, None, :, None], 0)
                received += weights.sum(dim=(1, 2))
        return received / (heads * self.text_rows.sum(dim=1, keepdim=True).clamp(min=1))

    def may_have_text_rows(self) -> Tensor:
        """(B,), bool: text rows in a layer of this pass, whose window may be wider than that of this one."""
        if self.visible is None or self.score_rows == "generated":
            return self.text_rows.any(dim=1)
        counts = measures.key_counts(self.query_modality, self.key_modality, self.num_modalities, is_causal=True)
        see_all = measures.rows_that_see_all(torch.maximum(counts, self.counts), self.key_modality)
        return (see_all & (self.query_modality == 0)).any(dim=1)

    @functools.cached_property
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

    def _with_and_without_first(self, counts: Tensor, rows: slice) -> Tensor:
        """(B, 2, rows, M), float64: counts of keys (B, rows, M), and those of the keys but the first token."""
        others = counts - (self.is_of_first & self.sees_first[:, rows, None]).long()
        return torch.stack([counts, others], dim=1).double()


class _GeneratedRows:
    """The rows of generated tokens in a pass, and the keys of their prompts.

    Args:
        call: the pass.
        borders: (B, Nq), see :meth:`_Prompts.borders`.
        rows: those that any sequence has a generated token in, and all between.
    """

    def __init__(self, call: _Call, borders: Tensor, rows: slice):
        self.call, self.rows = call, rows
        self.borders = borders[:, rows]
        present = call.key_modality >= 0
        self.place = present.cumsum(dim=1) - 1  # of each key, in its sequence
        modalities = torch.arange(call.num_modalities, device=present.device)
        self.members = call.key_modality[..., None] == modalities  # (B, Nk, M)
        self.counts = self._count()

        # A modality without keys after a prompt has all its mass there. For the others the keys must be looked at.
        least = self.borders.masked_fill(self.borders == 0, present.shape[1]).amin(dim=1, keepdim=True)
        later = self.members & (present & (self.place >= least))[..., None]
        continued = later.any(dim=1).any(dim=0).nonzero()[:, 0].tolist()
        self.keys = {m: self.members[..., m].any(dim=0).nonzero()[:, 0] for m in continued}
        self.later = {m: later[..., m].any(dim=0).nonzero()[:, 0] for m in continued}

    @classmethod
    def of(cls, call: _Call, borders: Tensor) -> _GeneratedRows | None:
        """None if no row is generated. Waits for the device, once for each kind of layer in a pass."""
        places = (borders > 0).any(dim=0).nonzero()[:, 0].tolist()
        return cls(call, borders, slice(places[0], places[-1] + 1)) if places else None

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """pairs and null (1, 2, M, M), rows (1, 2, M)."""
        counts = self.call._with_and_without_first(self.counts, self.rows).clamp(min=0)
        rows = (counts.sum(dim=-1, keepdim=True) > 0).double()
        return self._sum(counts), self._sum(measures.uniform_mass(counts)), self._sum(rows)[..., 0]

    def flow(self, record: AttentionRecord, of_first: Tensor) -> Tensor:
        """(1, 2, H, M, M)."""
        batch, heads = record.mass.shape[:2]
        mass = record.mass[:, :, self.rows].clone()
        for m, keys in self.keys.items():
            block = max(1, BLOCK_ELEMENTS // (batch * heads * len(keys)))
            for start in range(0, self.borders.shape[1], block):
                rows = slice(start, start + block)
                borders, first, left = self.borders[:, rows, None], self.rows.start + start, None
                if mass.device.type == "cpu":  # the fewer keys; elsewhere it would wait for the device in every layer
                    later = self.later[m]
                    after = self.place[:, None, later] >= borders
                    left = record.mass_besides(after, m, first, later, borders[..., 0] > 0)
                if left is None:
                    left = record.mass_on(self.place[:, None, keys] < borders, m, first, keys)
                mass[:, :, rows, m] = left
        both = torch.stack([mass, (mass - of_first[:, :, self.rows]).clamp(min=0)], dim=1)
        total = mean_over_heads(both.sum(dim=-1, keepdim=True).mean(dim=-3, keepdim=True), record.mesh)
        return self._sum(measures.prompt_shares(both, total))

    def _count(self) -> Tensor:
        """(B, rows, M), int64: the keys of each prompt that a row sees."""
        call = self.call
        if call.visible is None:  # a row sees its prompt: the first keys, up to the column where that ends
            stop = torch.searchsorted(self.place + 1, self.borders.contiguous()) + 1
            counts = torch.nn.functional.pad(self.members.long().cumsum(dim=1), (0, 0, 1, 0))
            stop = torch.where(self.borders > 0, stop, 0)
            return counts.gather(1, stop[..., None].expand(-1, -1, call.num_modalities))
        visible = call.visible[:, 0].expand(-1, call.query_modality.shape[1], -1)[:, self.rows]
        visible = visible & (self.place[:, None] < self.borders[..., None])
        return (visible.float() @ self.members.float()).round().long()

    def _sum(self, values: Tensor) -> Tensor:
        """(B, 2, ..., rows, K) -> (1, 2, ..., M, K): over the generated rows of each modality."""
        modality = self.call.query_modality[:, self.rows]
        chosen = measures.choose_rows(modality, self.call.num_modalities, self.borders > 0)
        return measures.sum_rows(values, chosen)[None]


def _modality_names(numbers: dict[str, int] | None, count: int) -> tuple[str, ...]:
    """A name for each modality: its kinds of token, or its number."""
    if numbers is None:
        return ("text", *("vision" if count == 2 else f"modality {m}" for m in range(1, count)))
    if set(numbers.values()) != set(range(count)):
        raise ValueError(f"AttentionMeter: modalities must number the model's {count} modalities from 0, got {numbers}")
    return modality_names(numbers)


def _transformers_model(model: nn.Module) -> nn.Module:
    """The Transformers model inside of what wraps it, which gets the labels; any other model itself."""
    known = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    return next((module for module in model.modules() if isinstance(module, known)), model)


def _is_over(values: object, modality: Tensor) -> TypeGuard[Tensor]:
    """Are these numbers for the tokens of the pass?"""
    return isinstance(values, Tensor) and not values.is_floating_point() and values.shape == modality.shape


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
