"""Runs tasks on a model, holds its answers, and compares models."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moda_ext.conversations import PLACEHOLDER, Conversation
from moda_ext.evaluation.answers import Progress, generate_answers, normalize
from moda_ext.evaluation.statistics import (
    ALPHA,
    PairedDifference,
    Proportion,
    SeedsDifference,
    f1_scores,
    holm,
    paired_difference,
    seeds_difference,
)
from moda_ext.evaluation.tasks import Task

__all__ = ["Answer", "Comparison", "Evaluation", "LanguageBias", "TaskResult", "compare", "evaluate", "language_bias"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered to one question.

    Attributes:
        id: of the conversation.
        question: the user's last turn.
        expected, given: answers.
        correct: whether they match (:func:`moda_ext.evaluation.answers.normalize`); None for a judged task.
        choices: the answers that the question leaves, or () for any text.
        hinted: what a hint suggests, or None.
        key: which the forms of one question share, or None.
        images: files.
        scores: of a judge, evaluated / reference by aspect.
        errors: of a judge, why there is no score, by aspect.
    """

    id: str
    question: str
    expected: str
    given: str
    correct: bool | None
    choices: tuple[str, ...] = ()
    hinted: str | None = None
    key: str | None = None
    images: tuple[str, ...] = ()
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def follows(self, hinted: str) -> bool:
        """Whether it is the answer that a hint suggests."""
        return normalize(self.given) == normalize(hinted)

    @property
    def is_a_choice(self) -> bool:
        return normalize(self.given) in map(normalize, self.choices)


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A model's answers to one :class:`~moda_ext.evaluation.tasks.Task`, whose fields it repeats."""

    name: str
    answers: tuple[Answer, ...]
    group: str = ""
    hint: str = "none"
    labels: tuple[str, ...] = ()
    positive: str | None = None
    judged: bool = False
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name, with the hint."""
        return self.name if self.hint == "none" else f"{self.name}, {self.hint} hint"

    @property
    def accuracy(self) -> Proportion:
        """The share of right answers, by exact match.

        Raises:
            ValueError: a judged task.
        """
        if self.judged:
            raise ValueError(f"task {self.name}: is scored by a judge, and has no accuracy")
        return Proportion(sum(bool(answer.correct) for answer in self.answers), len(self.answers))

    @property
    def chance(self) -> float | None:
        """What the best constant answer gets: the share of the most frequent one, or of one choice if larger.

        None where there is a hint: whoever repeats it, or never does, sees no picture either.
        """
        if self.hint != "none":
            return None
        expected = Counter(normalize(answer.expected) for answer in self.answers)
        choice = [1 / len(answer.choices) if answer.choices else 0.0 for answer in self.answers]
        return max(expected.most_common(1)[0][1], sum(choice)) / len(self.answers)

    @property
    def at_chance(self) -> bool:
        """Whether the interval of the accuracy does not lie above chance."""
        return self.chance is not None and self.accuracy.interval[0] <= self.chance

    @property
    def not_a_choice(self) -> int | None:
        """How many answers are none of the choices, and so are wrong; None where there are no choices."""
        with_choices = [answer for answer in self.answers if answer.choices]
        return sum(not answer.is_a_choice for answer in with_choices) if with_choices else None

    def f1(self) -> dict[str, float]:
        """F1 of a classification: ``"macro"``, and ``"binary"`` of the positive label or ``"weighted"`` by label."""
        if not self.labels:
            return {}
        expected = [normalize(answer.expected) for answer in self.answers]
        given = [normalize(answer.given) if answer.is_a_choice else None for answer in self.answers]
        labels = [normalize(label) for label in self.labels]
        scores, count = f1_scores(expected, given, labels), Counter(expected)
        macro = sum(scores.values()) / len(labels)
        if self.positive is not None:
            return {"binary": scores[normalize(self.positive)], "macro": macro}
        return {"weighted": sum(scores[label] * count[label] for label in labels) / len(expected), "macro": macro}

    def judged_scores(self) -> dict[str, float]:
        """The mean of evaluated / reference of each aspect, over the answers that have a score. {} without a judge."""
        aspects = dict.fromkeys(aspect for answer in self.answers for aspect in answer.scores)
        scores = {aspect: [a.scores[aspect] for a in self.answers if aspect in a.scores] for aspect in aspects}
        return {aspect: sum(found) / len(found) for aspect, found in scores.items()}

    @property
    def verdicts(self) -> int:
        """How many verdicts of a judge were asked for."""
        return sum(len(answer.scores) + len(answer.errors) for answer in self.answers)

    @property
    def judge_errors(self) -> int:
        """How many verdicts of a judge were none."""
        return sum(len(answer.errors) for answer in self.answers)

    def summary(self) -> dict[str, Any]:
        """The figures, for JSON."""
        figures: dict[str, Any] = {"task": self.name, "hint": self.hint, "group": self.group, "n": len(self.answers)}
        if self.judged:
            return {**figures, "scores": self.judged_scores(), "judge_errors": self.judge_errors}
        accuracy = self.accuracy
        return {
            **figures,
            "correct": accuracy.count,
            "accuracy": accuracy.value,
            "interval": accuracy.interval,
            "chance": self.chance,
            "at_chance": self.at_chance,
            "not_a_choice": self.not_a_choice,
            "f1": self.f1(),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """What :meth:`to_dict` gave, from JSON too."""
        answers = tuple(
            Answer(**{**a, "choices": tuple(a["choices"]), "images": tuple(a["images"])}) for a in data["answers"]
        )
        return cls(**{**data, "answers": answers, "labels": tuple(data["labels"]), "notes": tuple(data["notes"])})


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of one model."""

    model: str
    results: tuple[TaskResult, ...]

    def overall(self) -> list[bool]:
        """Whether each question without a hint is answered right, over all tasks that have an exact answer."""
        found = [result for result in self.results if not result.judged and result.hint == "none"]
        return [bool(answer.correct) for result in found for answer in result.answers]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """What :meth:`to_dict` gave, from JSON too."""
        return cls(data["model"], tuple(map(TaskResult.from_dict, data["results"])))


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    progress: Progress = iter,
) -> TaskResult:
    """Asks a model every question of a task, decoding greedily.

    Args:
        model, processor: as :func:`moda_ext.diagnostics.load_model` gives them.
        task: the questions.
        batch_size: questions at a time.
        max_new_tokens: of an answer, by default the task's.
        progress: wraps the list of batches, for a progress bar.

    Raises:
        ValueError: a checkpoint without a chat template, a model in training mode, or a batch size below 1.
        OSError: a picture that cannot be read.
    """
    if model.training:
        raise ValueError("evaluate: the model is in training mode, so its answers may be random; call model.eval()")
    given = generate_answers(
        model,
        processor,
        task.conversations,
        max_new_tokens=task.max_new_tokens if max_new_tokens is None else max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    answers = tuple(_answer(task, c, text) for c, text in zip(task.conversations, given, strict=True))
    return TaskResult(task.name, answers, task.group, task.hint, task.labels, task.positive, task.judged, task.notes)


def _answer(task: Task, conversation: Conversation, given: str) -> Answer:
    return Answer(
        id=conversation.id,
        question=conversation.prompt.messages[-1][1].replace(PLACEHOLDER, "").strip(),
        expected=conversation.answer,
        given=given,
        correct=None if task.judged else normalize(given) == normalize(conversation.answer),
        choices=task.choices(conversation),
        hinted=conversation.fields.get("hinted"),
        key=None if (key := conversation.fields.get("question")) is None else str(key),
        images=tuple(str(image) for image in conversation.images if isinstance(image, Path)),
    )


@dataclasses.dataclass(frozen=True)
class LanguageBias:
    """What hints in the question do to the answers of one task.

    Attributes:
        name: of the task.
        accuracy: by ``"none"``, ``"right"`` and ``"wrong"`` hint, as far as it has such questions.
        follows: how often the answer is what a wrong hint suggests: the prior-following rate.
        null: how often it is that too where the same question is asked without a hint; None where no question without
            a hint has the key of one with a wrong hint.
    """

    name: str
    accuracy: dict[str, Proportion]
    follows: Proportion
    null: Proportion | None


def language_bias(results: Sequence[TaskResult]) -> list[LanguageBias]:
    """The language bias of each task that has questions with a wrong hint, of one model's results."""
    found = []
    for wrong in results:
        if wrong.hint != "wrong" or wrong.judged:
            continue
        forms = {result.hint: result for result in results if result.name == wrong.name}
        plain = {a.key: a for a in forms["none"].answers if a.key is not None} if "none" in forms else {}
        same = [plain[a.key].follows(str(a.hinted)) for a in wrong.answers if a.key in plain]
        follows = follows_hints(wrong)
        found.append(
            LanguageBias(
                wrong.name,
                {hint: forms[hint].accuracy for hint in ("none", "right", "wrong") if hint in forms},
                Proportion(sum(follows), len(follows)),
                Proportion(sum(same), len(same)) if same else None,
            )
        )
    return found


def follows_hints(result: TaskResult) -> list[bool]:
    """Whether each answer is what the hint in its question suggests."""
    return [answer.follows(str(answer.hinted)) for answer in result.answers]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One or several pairs of models on the same questions.

    Attributes:
        title: what is compared.
        pairs: the difference of each pair.
        questions: of the questions, each gained or lost if more pairs gained than lost it, or the other way round.
        seeds: over the pairs, where there are several.
        p: that decides: of McNemar's exact test over questions, and with several pairs the larger of that and of the
            t-test over pairs, so that questions and seeds must both bear a difference out.
        corrected: by Holm for the number of tasks; p itself for what is over all tasks.
    """

    title: str
    pairs: tuple[PairedDifference, ...]
    questions: PairedDifference
    seeds: SeedsDifference | None
    p: float
    corrected: float

    @property
    def difference(self) -> float:
        """Of accuracies, or of rates."""
        return self.questions.difference if self.seeds is None else self.seeds.mean

    @property
    def interval(self) -> tuple[float, float]:
        """Of the difference: of the one pair, or what holds Student's over the pairs and that of the questions."""
        low, high = self.questions.interval
        if self.seeds is None:
            return low, high
        return max(-1.0, min(low, self.seeds.interval[0])), min(1.0, max(high, self.seeds.interval[1]))

    @property
    def significant(self) -> bool:
        return self.corrected < ALPHA

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        figures = {"difference": self.difference, "interval": self.interval, "significant": self.significant}
        return {**dataclasses.asdict(self), **figures}


def compare(before: Sequence[Evaluation], after: Sequence[Evaluation]) -> tuple[Comparison | None, list[Comparison]]:
    """``(overall, by_task)``: models compared pair by pair, such as the same training with several seeds.

    Overall are all questions without a hint, None where there are none with an exact answer. By task come the accuracy
    of each, and how often a wrong hint is followed; Holm's correction is over all of these.

    Args:
        before, after: equally many, after[i] with before[i].

    Raises:
        ValueError: different numbers of models, or results that are not of the same questions.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"compare: needs equally many models on both sides, got {len(before)} and {len(after)}")
    asked = [[_asked(r, a) for r in e.results for a in r.answers] for e in (*before, *after)]
    if any(questions != asked[0] for questions in asked):
        raise ValueError("compare: the models were not asked the same questions")
    overall = [[e.overall() for e in side] for side in (before, after)]
    rows = [[_outcomes(e) for e in side] for side in (before, after)]
    by_task = [_compare(title, *([row[title] for row in side] for side in rows)) for title in rows[0][0]]
    corrected = holm([comparison.p for comparison in by_task])
    return (
        _compare("all questions without a hint", *overall) if overall[0][0] else None,
        [dataclasses.replace(c, corrected=p) for c, p in zip(by_task, corrected, strict=True)],
    )


def _asked(result: TaskResult, answer: Answer) -> tuple:
    """What must be the same of two answers that are compared. Folders may differ, such as those of two machines."""
    pictures = [Path(image).name for image in answer.images]
    return result.title, answer.id, answer.question, normalize(answer.expected), answer.hinted, answer.choices, pictures


def _outcomes(evaluation: Evaluation) -> dict[str, list[bool]]:
    """What is compared by task: yes or no for each question."""
    found = {}
    for result in evaluation.results:
        if result.judged:
            continue
        found[result.title] = [bool(answer.correct) for answer in result.answers]
        if result.hint == "wrong":
            found[f"{result.title}: follows it"] = follows_hints(result)
    return found


def _compare(title: str, before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> Comparison:
    pairs = tuple(map(paired_difference, before, after))
    # A question that several pairs are asked is one question: did more of them gain it, or lose it?
    net = [sum(b) - sum(a) for a, b in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)]
    questions = paired_difference([change < 0 for change in net], [change > 0 for change in net])
    seeds = seeds_difference([pair.difference for pair in pairs]) if len(pairs) > 1 else None
    p = questions.p if seeds is None else max(questions.p, seeds.p)
    return Comparison(title, pairs, questions, seeds, p, p)
