"""A prior without training: how much more the text looks at images, chosen on examples with misleading hints.

A *place* is a set of (layer, head) pairs, a *dose* b the number that is added to the scores of their text rows on image
keys (the modality prior w of docs/mathematics.md, section 2). Both are chosen on one half of the examples and judged on
the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moda_ext.conversations import HINTS, Conversation
from moda_ext.evaluation.answers import Progress, batches, forced_logits, generate_answers, normalize
from moda_ext.evaluation.statistics import Proportion
from moda_ext.evaluation.tasks import check_pictures
from moda_ext.reports import COLOURS, new_figure
from moda_ext.training.collator import IGNORED, Collator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DOSES",
    "Calibration",
    "PriorDial",
    "Scores",
    "Trial",
    "apply_prior",
    "calibrate",
    "check_examples",
    "choose",
    "dose_response",
    "halve",
    "head_gradients",
    "head_places",
    "layer_places",
    "measure",
    "score",
    "search",
]

DOSES = (0.5, 1.0, 1.5, 2.0, 3.0)
LEARNABLE = {"variant": "fix", "learn_prior": True}  # a mask that is a prior for each head, and nothing else


@dataclasses.dataclass(frozen=True)
class Scores:
    """What answers are worth.

    Attributes:
        accuracy: right answers by ``hint``, those of "none", "right" and "wrong" that there are.
        following: of the examples with a wrong hint, those whose answer is the hinted one; None where there are none.
        tasks: right answers without a hint, by ``task``.
    """

    accuracy: Mapping[str, Proportion]
    following: Proportion | None
    tasks: Mapping[str, Proportion]

    @property
    def objective(self) -> float:
        """What is to be as large as can be: less following, or accuracy where no hint is wrong."""
        return self.accuracy["none"].value if self.following is None else -self.following.value

    def proportions(self) -> dict[str, Proportion]:
        """What a table shows, by name."""
        found = {} if self.following is None else {"repeats a wrong hint": self.following}
        names = {"none": "right without a hint", "right": "right with a right hint", "wrong": "right with a wrong hint"}
        return {**found, **{name: self.accuracy[hint] for hint, name in names.items() if hint in self.accuracy}}

    def to_dict(self) -> dict:
        """Plain values."""
        accuracy, tasks = ({k: _values(p) for k, p in shares.items()} for shares in (self.accuracy, self.tasks))
        following = None if self.following is None else _values(self.following)
        return {"accuracy": accuracy, "following": following, "accuracy_by_task": tasks}


def _values(proportion: Proportion) -> dict:
    return {"count": proportion.count, "n": proportion.n, "interval": list(proportion.interval)}


class Trial(NamedTuple):
    """A place and a dose that were tried."""

    place: str
    dose: float
    scores: Scores


def hint_of(conversation: Conversation) -> str:
    """Its field ``hint``, "none" without one."""
    return conversation.fields.get("hint", "none")


def check_examples(conversations: Sequence[Conversation]) -> None:
    """Refuses examples that cannot be calibrated with.

    Raises:
        ValueError: a hint that is none of "none", "right" and "wrong", a wrong hint without the answer that it suggests
            (``hinted``) or whose answer is the right one, an example without an answer, or none without a hint.
        FileNotFoundError: a picture is missing.
    """
    for conversation in conversations:
        hint, hinted = hint_of(conversation), conversation.fields.get("hinted")
        if hint not in HINTS:
            raise ValueError(f"conversation {conversation.id}: hint must be one of {', '.join(HINTS)}, got {hint!r}")
        if hint == "wrong":
            if not isinstance(hinted, str) or not normalize(hinted):
                raise ValueError(f"conversation {conversation.id}: a wrong hint needs 'hinted', the answer it suggests")
            if normalize(hinted) == normalize(conversation.answer):
                raise ValueError(f"conversation {conversation.id}: its hint is wrong, and 'hinted' is its answer")
        if not normalize(conversation.answer):
            raise ValueError(f"conversation {conversation.id}: its answer is empty")
    check_pictures(conversations)
    if all(hint_of(c) != "none" for c in conversations):
        raise ValueError("no example is without a hint: what a prior costs could not be seen")


def halve(conversations: Sequence[Conversation], seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Two halves that share no question, alike in how many questions have which hints.

    All forms of a question, those with the same ``question``, are in the same half; without one, an example is a
    question of its own.

    Raises:
        ValueError: one half would have no example without a hint, or none with a wrong one though there are some.
    """
    questions: dict[tuple[str, str], list[Conversation]] = {}
    for i, conversation in enumerate(conversations):
        question = conversation.fields.get("question")
        key = ("alone", str(i)) if question is None else ("question", str(question))
        questions.setdefault(key, []).append(conversation)
    kinds: dict[tuple, list[list[Conversation]]] = {}
    for forms in questions.values():
        kinds.setdefault(tuple(sorted({hint_of(c) for c in forms})), []).append(forms)
    halves: tuple[list[Conversation], list[Conversation]] = [], []
    turn = 0
    for _, group in sorted(kinds.items()):
        random.Random(seed).shuffle(group)
        for forms in group:
            halves[turn % 2].extend(forms)
            turn += 1
    for hint in ("none", "wrong"):
        found = [any(hint_of(c) == hint for c in half) for half in halves]
        if any(found) and not all(found):
            raise ValueError(f"examples of hint {hint!r} belong to one question: at least two are needed")
    return halves


def score(conversations: Sequence[Conversation], answers: Sequence[str]) -> Scores:
    """Exact match of normalised answers, with the expected and with the hinted ones."""
    right = [normalize(a) == normalize(c.answer) for c, a in zip(conversations, answers, strict=True)]
    hints = [hint_of(c) for c in conversations]
    follows = [
        normalize(a) == normalize(c.fields["hinted"])
        for c, a, hint in zip(conversations, answers, hints, strict=True)
        if hint == "wrong"
    ]
    tasks: dict[str, list[bool]] = {}
    for conversation, hint, match in zip(conversations, hints, right, strict=True):
        if hint == "none":
            tasks.setdefault(str(conversation.fields.get("task", "all")), []).append(match)
    by_hint = {hint: [match for match, own in zip(right, hints, strict=True) if own == hint] for hint in HINTS}
    return Scores(
        {hint: _proportion(matches) for hint, matches in by_hint.items() if matches},
        _proportion(follows) if follows else None,
        {task: _proportion(matches) for task, matches in sorted(tasks.items())},
    )


def _proportion(matches: Sequence[bool]) -> Proportion:
    return Proportion(sum(matches), len(matches))


def measure(model: Any, processor: Any, conversations: Sequence[Conversation], batch_size: int = 8) -> Scores:
    """The scores of a model's answers, decoded greedily.

    They may have eight tokens more than the longest answer that is looked for, so that what follows an answer shows.

    Args:
        model: anything with ``generate``, ``device`` and ``dtype``.
        processor: of its checkpoint.
        conversations: that passed :func:`check_examples`.
        batch_size: conversations at a time.
    """
    wanted = [c.answer for c in conversations] + [c.fields["hinted"] for c in conversations if hint_of(c) == "wrong"]
    longest = max(map(len, processor.tokenizer(wanted, add_special_tokens=False)["input_ids"]))
    answers = generate_answers(model, processor, conversations, max_new_tokens=longest + 8, batch_size=batch_size)
    return score(conversations, answers)


def choose(plain: Scores, trials: Sequence[Trial], tolerance: float) -> Trial | None:
    """The trial that follows wrong hints least, and is right most where no hint is wrong; None if none is better.

    Args:
        plain: scores without a prior.
        trials: on the same examples.
        tolerance: percentage points of accuracy without hints that may be lost against ``plain``.

    Returns:
        Of equally good ones, the more accurate with wrong hints, then without hints, then the smaller dose.
    """

    def merit(trial: Trial) -> tuple[float, ...]:
        accuracy = trial.scores.accuracy
        counts = [accuracy[hint].count for hint in ("wrong", "none") if hint in accuracy]
        return trial.scores.objective, *counts, -trial.dose

    def lost(trial: Trial) -> float:
        return 100 * (plain.accuracy["none"].value - trial.scores.accuracy["none"].value)

    allowed = [t for t in trials if lost(t) <= tolerance + 1e-9 and t.scores.objective > plain.objective]
    return max(allowed, key=merit, default=None)


def search(
    places: Sequence[str],
    measured: Callable[[str, float], Scores],
    plain: Scores,
    tolerance: float,
    doses: Sequence[float] = DOSES,
    progress: Progress = iter,
) -> list[Trial]:
    """Every place with every dose, then the doses half way to the neighbours of the best.

    Where none is better than none at all, half of the smallest dose is tried everywhere.

    Args:
        places: names.
        measured: from a place and a dose to scores.
        plain: scores without a prior.
        tolerance: see :func:`choose`.
        doses: above 0, in increasing order.
        progress: wraps the list of what is to be measured.

    Raises:
        ValueError: doses that are not so.
    """
    if not doses or not all(a < b for a, b in itertools.pairwise([0.0, *doses])):
        raise ValueError(f"doses must be above 0 and increase, got {', '.join(map(str, doses))}")

    def tried(pairs: list[tuple[str, float]]) -> list[Trial]:
        return [Trial(place, dose, measured(place, dose)) for place, dose in progress(pairs)]

    trials = tried([(place, dose) for place in places for dose in doses])
    best = choose(plain, trials, tolerance)
    if best is None:
        return trials + tried([(place, doses[0] / 2) for place in places])
    steps = [0.0, *doses]
    near = steps.index(best.dose)
    return trials + tried([(best.place, (a + b) / 2) for a, b in itertools.pairwise(steps[near - 1 : near + 2])])


class PriorDial:
    """The prior of text rows on image keys of a loaded model, for every layer and head, to be turned in place.

    A model without MODA gets a prior of 0 in every layer that can have one, and computes what it did. All other weights
    are frozen.

    Args:
        model: as :func:`moda_ext.diagnostics.load_model` gives it.

    Attributes:
        model: it.
        shape: (L, H), all layers of the text stack and their heads.
        layers: indices of those that have a prior.

    Raises:
        ValueError: a model with MODA that has no prior or one that is not learned, or of a family without MODA.
    """

    def __init__(self, model: Any):
        from moda_ext.integrations.transformers import MODAConfig, apply_moda, attention_modules
        from moda_ext.integrations.transformers.models import has_moda

        if not has_moda(model, "PriorDial"):
            apply_moda(model, MODAConfig(aligner=None, mask=LEARNABLE))
        model.requires_grad_(False)
        modules = attention_modules(model)
        masks = {m.layer_idx: m.moda.mask for m in modules if getattr(m, "moda", None) is not None}
        priors = {layer: getattr(mask, "prior", None) for layer, mask in masks.items()}
        self.model = model
        self.priors = {layer: prior for layer, prior in priors.items() if isinstance(prior, nn.Parameter)}
        if not priors or self.priors.keys() != priors.keys():
            raise ValueError("this model has MODA without a learned prior; calibrate the one that it was made of")
        for prior in self.priors.values():
            prior.requires_grad_(True)
        self._start = {layer: prior.detach().clone() for layer, prior in self.priors.items()}
        modalities = model.config.text_config.moda["modalities"]
        self._pair = (slice(None), modalities["text"], modalities["image"])
        self.shape = (len(modules), next(iter(self.priors.values())).shape[0])
        self.layers = sorted(self.priors)

    @torch.no_grad()
    def set(self, doses: Tensor) -> None:
        """Adds doses, (L, H), to the priors that the model came with.

        Raises:
            ValueError: another shape, or a dose for a layer without a prior.
        """
        if doses.shape != self.shape or doses[[i for i in range(self.shape[0]) if i not in self.priors]].any():
            raise ValueError(f"doses must have shape {self.shape}, and be 0 outside of the layers {self.layers}")
        for layer, prior in self.priors.items():
            prior.copy_(self._start[layer])
            prior[self._pair] += doses[layer].to(prior)

    def gradient(
        self,
        processor: Any,
        weighted: Sequence[tuple[Conversation, float]],
        batch_size: int = 8,
        progress: Progress = iter,
    ) -> Tensor:
        r"""d/db of :math:`\sum_i w_i \log p(\text{answer}_i)`, one number for each layer and head: (L, H), float64.

        Args:
            processor: of the model.
            weighted: conversations that end with an answer, along which the model is led, and their weights w.
            batch_size: conversations at a time.
            progress: wraps the list of batches.

        Raises:
            ValueError: a gradient that is not finite.
        """
        collate, priors = Collator(processor, needs_end=False), list(self.priors.values())
        conversations = [conversation for conversation, _ in weighted]
        total = torch.zeros(self.shape, dtype=torch.float64)
        for batch in progress(batches(conversations, processor, batch_size)):
            logits, labels = forced_logits(self.model, collate, [conversations[i] for i in batch])
            row, place = (labels != IGNORED).nonzero(as_tuple=True)
            logits = logits[row, place]
            dtype = torch.promote_types(logits.dtype, torch.float32)
            chosen = logits.log_softmax(-1, dtype=dtype).gather(-1, labels[row, place, None].to(logits.device))[:, 0]
            weights = torch.tensor([weighted[i][1] for i in batch], dtype=dtype)[row].to(chosen.device)
            for layer, gradient in zip(self.priors, torch.autograd.grad((weights * chosen).sum(), priors), strict=True):
                total[layer] += gradient[self._pair].double().cpu()
        if not total.isfinite().all():
            raise ValueError(f"a gradient is not finite in {self.model.dtype}; use bfloat16 or float32")
        return total


def layer_places(dial: PriorDial, ranges: Sequence[tuple[int, int]] = ()) -> dict[str, Tensor]:
    """Ranges of layers, by name: all, halves, thirds and ``ranges``; each as (L, H) of 1 where the dose goes, else 0.

    Args:
        dial: of the model.
        ranges: (first, last) layers, both included.

    Raises:
        ValueError: a range that is none, or without a layer that can have a prior.
    """
    layers, count = dial.layers, dial.shape[0]
    parts = [layers]
    for pieces in (2, 3):
        cuts = [round(i * len(layers) / pieces) for i in range(pieces + 1)]
        parts += [layers[a:b] for a, b in itertools.pairwise(cuts)]
    for first, last in ranges:
        inside = [layer for layer in layers if first <= layer <= last]
        if not 0 <= first <= last < count or not inside:
            raise ValueError(f"layers must be a range in 0 to {count - 1} with full attention, got {first}-{last}")
        parts.append(inside)
    places = {}
    for part in filter(None, parts):
        table = torch.zeros(dial.shape)
        table[part] = 1
        name = f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]}-{part[-1]}"
        places[name] = table
    return places


def head_gradients(
    dial: PriorDial,
    processor: Any,
    conversations: Sequence[Conversation],
    batch_size: int = 8,
    progress: Progress = iter,
) -> tuple[Tensor, Tensor]:
    r"""``(gain, keep)``, both (L, H): what the first bit of a dose does, to first order, at each head.

    ``gain`` is d/db of the mean of :math:`\log p(\text{expected}) - \log p(\text{hinted})` over examples with a wrong
    hint, ``keep`` that of the mean of :math:`\log p(\text{expected})` over those without a hint. Where no hint is wrong
    both are the latter.
    """
    none, wrong = ([c for c in conversations if hint_of(c) == hint] for hint in ("none", "wrong"))
    keep = dial.gradient(processor, [(c, 1.0) for c in none], batch_size, progress) / len(none)
    if not wrong:
        return keep, keep
    pairs = [(c, 1.0) for c in wrong]
    for c in wrong:
        hinted = dataclasses.replace(c, messages=(*c.messages[:-1], ("assistant", c.fields["hinted"])))
        pairs.append((hinted, -1.0))
    return dial.gradient(processor, pairs, batch_size, progress) / len(wrong), keep


def head_places(gain: Tensor, keep: Tensor) -> dict[str, Tensor]:
    r"""The heads with most gain for their cost, by their number: 1/32, 1/16, ... of all, up to all that gain at all.

    They are ranked by :math:`\text{gain} / (\max(0, -\text{keep}) + \overline{|\text{keep}|})`: the mean over heads
    keeps those that cost nothing and gain next to nothing from coming first.

    Args:
        gain, keep: (L, H), of :func:`head_gradients`.

    Returns:
        (L, H) of 1 where the dose goes, else 0, by name; none where no head gains.
    """
    ranked = (gain / (keep.clamp(max=0).neg() + keep.abs().mean())).flatten()
    order = ranked.argsort(descending=True, stable=True)
    order = order[gain.flatten()[order] > 0]
    places = {}
    for part in (32, 16, 8, 4, 2, 1):
        number = min(max(1, gain.numel() // part), len(order))
        if number:
            table = torch.zeros(gain.numel())
            table[order[:number]] = 1
            places["1 head" if number == 1 else f"{number} heads"] = table.view(gain.shape)
    return places


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        plain: scores without a prior, on the half that was chosen on.
        trials: all that was tried on it.
        chosen: the best, or None.
        doses: (L, H), of the best, or None.
        before, after: scores on the half held out, without the prior and with it; ``after`` is None without one.
        tolerance: percentage points.
        gradients: of :func:`head_gradients`, where heads were ranked.
    """

    plain: Scores
    trials: tuple[Trial, ...]
    chosen: Trial | None
    doses: Tensor | None
    before: Scores
    after: Scores | None
    tolerance: float
    gradients: tuple[Tensor, Tensor] | None = None

    def to_dict(self) -> dict:
        """Plain values, for JSON. Rates are in 0 to 1, intervals Wilson's at 95 %."""
        chosen = None
        if self.chosen is not None and self.doses is not None:
            chosen = {"place": self.chosen.place, "dose": self.chosen.dose, "doses": self.doses.tolist()}
        found: dict[str, Any] = {
            "tolerance_points": self.tolerance,
            "chosen": chosen,
            "held_out": {
                "before": self.before.to_dict(),
                "after": None if self.after is None else self.after.to_dict(),
            },
            "selection": {
                "before": self.plain.to_dict(),
                "trials": [{"place": t.place, "dose": t.dose, **t.scores.to_dict()} for t in self.trials],
            },
        }
        if self.gradients is not None:
            found["gradients"] = dict(zip(("gain", "keep"), (g.tolist() for g in self.gradients), strict=True))
        return found


def calibrate(
    dial: PriorDial,
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    places: Mapping[str, Tensor] | None = None,
    tolerance: float = 1.0,
    doses: Sequence[float] = DOSES,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress = iter,
    keep: Callable[[Calibration], object] = lambda _: None,
) -> Calibration:
    """Finds the prior that follows wrong hints least (or is right most, where no hint is wrong), and judges it.

    Place and dose are chosen on half of the questions, see :func:`search`; the other half is for judging alone.

    Args:
        dial: of the model, which has the chosen prior afterwards, or the one that it came with.
        processor: of the model.
        conversations: with answers; ``hint``, ``hinted``, ``question`` and ``task`` among their fields.
        places: (L, H) of 1 where the dose goes, else 0, by name; by default the best heads, see :func:`head_places`.
        tolerance: percentage points that accuracy without hints may lose on the half that is chosen on.
        doses: natural logarithms, above 0, in increasing order.
        seed: of the halves.
        batch_size: conversations at a time.
        progress: wraps lists of what is to be done.
        keep: called after each trial with what was measured so far, of which nothing is chosen yet.

    Raises:
        ValueError, FileNotFoundError: see :func:`check_examples`, :func:`halve` and :func:`search`.
    """
    check_examples(conversations)
    if tolerance < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    selection, held_out = halve(conversations, seed)
    dial.set(torch.zeros(dial.shape))
    gradients = None
    if places is None:
        gradients = head_gradients(dial, processor, selection, batch_size, progress)
        places = head_places(*gradients)
    plain, before = (measure(dial.model, processor, half, batch_size) for half in (selection, held_out))

    tried: list[Trial] = []

    def measured(place: str, dose: float) -> Scores:
        dial.set(dose * places[place])
        found = measure(dial.model, processor, selection, batch_size)
        tried.append(Trial(place, dose, found))
        keep(Calibration(plain, tuple(tried), None, None, before, None, tolerance, gradients))
        return found

    trials = search(list(places), measured, plain, tolerance, doses, progress)
    chosen = choose(plain, trials, tolerance)
    found = None if chosen is None else chosen.dose * places[chosen.place]
    dial.set(torch.zeros(dial.shape) if found is None else found)
    after = None if found is None else measure(dial.model, processor, held_out, batch_size)
    return Calibration(plain, tuple(trials), chosen, found, before, after, tolerance, gradients)


def apply_prior(model: Any, doses: Tensor) -> None:
    """Puts doses, (L, H), into a model, so that its checkpoint has them: as it was when :class:`PriorDial` got it.

    One dose for whole layers becomes :meth:`MODAConfig.fixed_prior`, without parameters; other doses become learned
    priors of the layers that have any. In a model with MODA they are added to its priors.
    """
    from moda_ext.integrations.transformers import MODAConfig, apply_moda
    from moda_ext.integrations.transformers.models import has_moda

    if not has_moda(model, "apply_prior"):
        layers = doses.any(dim=1).nonzero()[:, 0].tolist()
        values = doses[layers].unique().tolist()
        if len(values) == 1:
            apply_moda(model, MODAConfig.fixed_prior([[0.0, values[0]], [0.0, 0.0]], layers=layers))
            return
        apply_moda(model, MODAConfig(aligner=None, mask=LEARNABLE, layers=layers))
    PriorDial(model).set(doses)


def dose_response(calibration: Calibration) -> Figure:
    """Following and accuracy, without hints and with right and wrong ones, against the dose: a line for each place.

    On the half that was chosen on, with bands of the 95 % intervals; a ring is around what was chosen.

    Raises:
        ImportError: matplotlib or scipy is not installed.
    """
    panels = list(calibration.plain.proportions())
    figure, axes = new_figure(len(panels), width=3.8 * len(panels), height=4.2)
    for axis, title in zip(axes, panels, strict=True):
        for k, place in enumerate(dict.fromkeys(t.place for t in calibration.trials)):
            points = {t.dose: t.scores.proportions()[title] for t in calibration.trials if t.place == place}
            points[0.0] = calibration.plain.proportions()[title]
            doses = sorted(points)
            low, high = zip(*(points[dose].interval for dose in doses), strict=True)
            colour = COLOURS[k % len(COLOURS)]
            axis.plot(
                doses,
                [100 * points[dose].value for dose in doses],
                color=colour,
                marker="o",
                markersize=3.5,
                label=place,
            )
            axis.fill_between(doses, [100 * x for x in low], [100 * x for x in high], color=colour, alpha=0.1)
        if calibration.chosen is not None:
            chosen = calibration.chosen.dose, 100 * calibration.chosen.scores.proportions()[title].value
            axis.plot(*chosen, "o", markersize=11, markerfacecolor="none", markeredgecolor="black")
        axis.set(title=title, xlabel="dose b", ylim=(-2, 102))
    axes[0].set_ylabel("% of examples")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
