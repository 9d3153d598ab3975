"""The report of an evaluation: one HTML file, the figures beside it as JSON, and every answer as JSON lines."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moda_ext.conversations import load_picture
from moda_ext.evaluation.evaluate import (
    Answer,
    Comparison,
    Evaluation,
    LanguageBias,
    TaskResult,
    compare,
    language_bias,
)
from moda_ext.evaluation.statistics import Proportion
from moda_ext.reports import COLOURS, chart, escape, new_figure, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["percent", "summarize", "write_answers", "write_report"]

EXAMPLES = 2  # right ones, and wrong ones, of each task
THUMBNAIL = 96  # pixels
HINTED = {"none": "without a hint", "right": "with a right hint", "wrong": "with a wrong hint"}
ACCURACY = (
    "The share of answers that are the expected one, without regard to case, surrounding space and a full stop at the "
    "end. In parentheses: Wilson's 95 % interval. Chance is what the best constant answer would get: the share of "
    "the most frequent expected answer of the task, or of one choice if that is larger. A task is at chance where the "
    "interval does not lie above it; one with hints has no chance."
)
BIAS = (
    "A question is also asked with a hint, a remark in it that suggests the right or a wrong answer. The "
    "prior-following rate is how often the answer is what a wrong hint suggests; its null is how often the same "
    "questions get that answer without any hint, of those that are asked so too."
)
COMPARED = (
    "Differences are in percentage points, of the same questions. p is of McNemar's exact test, the interval is Bonett "
    "and Price's (J. Educ. Behav. Stat. 37, 2012). The last column is corrected for the number of lines by task "
    "(Holm); a difference whose p is not below 0.05 is called no significant difference. Questions with a hint count "
    "in their own lines alone."
)
SEEDS = (
    "There are several pairs: the difference is their mean, and a question is gained if more pairs gained than lost "
    "it. The interval holds Student's over pairs and that over questions, and p is the larger of the t-test's and "
    "McNemar's, so that seeds and questions must both bear a difference out."
)
JUDGED = (
    "The mean of evaluated / reference score, as a judge gave them (1: as good as the reference), and of how many "
    "answers it is. A verdict that holds no scores is counted as an error and is in no mean."
)


def percent(value: Proportion) -> str:
    """Such as ``"65.0 % (56.1 to 73.0)"``."""
    low, high = value.interval
    return f"{100 * value.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def summarize(
    before: Sequence[Evaluation],
    after: Sequence[Evaluation] = (),
    compared: tuple[Comparison | None, list[Comparison]] | None = None,
) -> list[str]:
    """The findings in words: of each model, and of the comparison where there is one.

    Args:
        before, after: models, as in :func:`~moda_ext.evaluation.compare`; ``after`` may be empty.
        compared: what that function gave for them, where it is known already.
    """
    sentences = [sentence for evaluation in (*before, *after) for sentence in _findings(evaluation)]
    if after:
        overall, by_task = compared or compare(before, after)
        names = [", ".join(e.model for e in side) for side in (after, before)]
        if overall is not None:
            sentences.append(f"{names[0]} less {names[1]}, {overall.title}: {_difference(overall)}.")
        different = [f"{c.title} ({_points(c.difference)})" for c in by_task if c.significant]
        if by_task:
            sentences.append(
                f"Of {len(by_task)} comparisons by task, corrected by Holm, "
                + (f"these differ: {'; '.join(different)}." if different else "none shows a significant difference.")
            )
    return sentences


def write_answers(path: str | Path, evaluations: Sequence[Evaluation]) -> None:
    """Every answer of every model as a line of JSON: model, task and hint, and the fields of :class:`Answer`."""
    with open(path, "w", encoding="utf-8") as file:
        for evaluation in evaluations:
            for result in evaluation.results:
                for answer in result.answers:
                    about = {"model": evaluation.model, "task": result.name, "hint": result.hint}
                    file.write(json.dumps({**about, **dataclasses.asdict(answer)}, ensure_ascii=False) + "\n")


def write_report(
    path: str | Path,
    before: Sequence[Evaluation],
    after: Sequence[Evaluation] = (),
    *,
    notes: Sequence[str] = (),
    versions: dict[str, str] | None = None,
    command: str = "",
) -> None:
    """Writes the report, and beside it the figures as ``.json`` and the answers as ``.jsonl``.

    Args:
        path: of the HTML file.
        before: models, asked the same questions.
        after: those that are compared with them pair by pair, equally many, or none.
        notes: sentences for the reader.
        versions: software, for the last line.
        command: that made the answers, for the last line.

    Raises:
        ValueError: no model, or models that were not asked the same questions.
        ImportError: matplotlib, pillow or scipy is not installed.
    """
    if not before:
        raise ValueError("write_report: needs a model")
    evaluations = [*before, *after]
    overall, by_task = compare(before, after) if after else (None, [])
    notes = list(dict.fromkeys([*(n for e in evaluations for r in e.results for n in r.notes), *notes]))
    names = " and ".join(e.model for e in evaluations)
    parts = [
        f"<h1>Answers of {escape(names)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in summarize(before, after, (overall, by_task))),
        *(f'<p class="note">{escape(sentence)}</p>' for sentence in notes),
        *_accuracy_section(evaluations),
        *_judged_section(evaluations),
        *_bias_section(evaluations),
        *_comparison_section(overall, by_task),
        *_examples_section(evaluations),
    ]
    made = [f"{name} {version}" for name, version in (versions or {}).items()]
    parts.append(f"<p class='null'>{escape(', '.join([*made, 'answers decoded greedily']))}</p>")
    if command:
        parts.append(f"<p class='null'><code>{escape(command)}</code></p>")
    write_page(path, f"Answers of {names}", parts)
    write_answers(Path(path).with_suffix(".jsonl"), evaluations)
    data = {
        "command": command,
        "versions": versions or {},
        "notes": notes,
        "models": [_figures(evaluation) for evaluation in evaluations],
        "overall": None if overall is None else overall.to_dict(),
        "by_task": [comparison.to_dict() for comparison in by_task],
    }
    Path(path).with_suffix(".json").write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "model": evaluation.model,
        "tasks": [result.summary() for result in evaluation.results],
        "language_bias": [dataclasses.asdict(bias) for bias in language_bias(evaluation.results)],
    }


def _findings(evaluation: Evaluation) -> list[str]:
    """The main figures of one model in words."""
    sentences, outcomes = [], evaluation.overall()
    if outcomes:
        found = Proportion(sum(outcomes), len(outcomes))
        sentences.append(f"{found.count} of {found.n} questions without a hint are answered right: {percent(found)}.")
    plain = [result for result in evaluation.results if not result.judged and result.hint == "none"]
    poor = [result.title for result in plain if result.at_chance]
    if poor:
        sentences.append(f"At chance: {'; '.join(poor)}.")
    biases = language_bias(evaluation.results)
    # Beside the null stand the tasks that have one; where none has, there is nothing to stand beside.
    both = [(bias.follows, bias.null) for bias in biases if bias.null is not None]
    follows = [follow for follow, _ in both] or [bias.follows for bias in biases]
    if follows:
        told = f"A wrong hint is followed in {_of(_pooled(follows))} questions"
        null = f"; without a hint, that answer is given in {_of(_pooled([null for _, null in both]))}" if both else ""
        sentences.append(f"{told}{null}.")
    for result in evaluation.results:
        if result.judged and not result.judged_scores():
            sentences.append(f"{result.title}: there is no score, as no judge gave one.")
        elif result.judge_errors:
            why = next(reason for answer in result.answers for reason in answer.errors.values())
            sentences.append(
                f"{result.title}: {result.judge_errors} of {result.verdicts} verdicts are missing and in no mean, so "
                f"that models may not stand on the same answers; the first because: {why}."
            )
    return [f"{evaluation.model}: {' '.join(sentences)}"] if sentences else []


def _pooled(shares: Sequence[Proportion]) -> Proportion:
    return Proportion(sum(s.count for s in shares), sum(s.n for s in shares))


def _of(share: Proportion) -> str:
    return f"{percent(share)} of {share.n}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _difference(comparison: Comparison) -> str:
    low, high = comparison.interval
    verdict = "a significant difference" if comparison.significant else "no significant difference"
    return (
        f"{_points(comparison.difference)} (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"{_p(comparison.corrected)}), {verdict}"
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Of cells that are HTML."""
    rows = ["".join(f"<th>{cell}</th>" for cell in head)]
    rows += ["".join(f"<td>{cell}</td>" for cell in line) for line in lines]
    return f'<div class="scroll"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _labelled(result: TaskResult) -> str:
    return escape(f"{result.title} ({result.group})" if result.group else result.title)


def _by_task(evaluations: Sequence[Evaluation], *, judged: bool) -> list[tuple[TaskResult, ...]]:
    """The results of all models, task by task."""
    tasks = zip(*(evaluation.results for evaluation in evaluations), strict=True)
    return [results for results in tasks if results[0].judged is judged]


def _accuracy_section(evaluations: Sequence[Evaluation]) -> list[str]:
    tasks = _by_task(evaluations, judged=False)
    if not tasks:
        return []
    models = [escape(evaluation.model) for evaluation in evaluations]
    lines = []
    for results in tasks:
        tags = [" <strong>at chance</strong>" if result.at_chance else "" for result in results]
        shares = [percent(result.accuracy) + tag for result, tag in zip(results, tags, strict=True)]
        chance = "–" if results[0].chance is None else f"{100 * results[0].chance:.1f} %"
        lines.append([_labelled(results[0]), str(len(results[0].answers)), chance, *shares])
    for group in dict.fromkeys(results[0].group for results in tasks if results[0].group):
        plain = [results for results in tasks if results[0].group == group and results[0].hint == "none"]
        pooled = [_pooled([result.accuracy for result in column]) for column in zip(*plain, strict=True)]
        if len(plain) > 1:
            lines.append([escape(f"all {group}, without a hint"), str(pooled[0].n), "", *map(percent, pooled)])
    parts = [f"<h2>Accuracy</h2><p>{ACCURACY}</p>", _table(["task", "n", "chance", *models], lines)]
    lines = [
        [f"{_labelled(result)}: {model}", _scores(result.f1()), str(result.not_a_choice)]
        for results in tasks
        for model, result in zip(models, results, strict=True)
        if result.labels or result.not_a_choice
    ]
    if lines:
        parts.append("<p>Where a question leaves a choice, an answer that is none of it counts as wrong.</p>")
        parts.append(_table(["task", "F1", "answers that are no choice"], lines))
    return parts


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores.items()) or "–"


def _judged_section(evaluations: Sequence[Evaluation]) -> list[str]:
    tasks = [results for results in _by_task(evaluations, judged=True) if any(r.judged_scores() for r in results)]
    if not tasks:
        return []
    models = [escape(evaluation.model) for evaluation in evaluations]
    lines = []
    for results in tasks:
        scores = [result.judged_scores() for result in results]
        for aspect in dict.fromkeys(aspect for found in scores for aspect in found):
            numbers = [sum(aspect in answer.scores for answer in result.answers) for result in results]
            cells = [
                f"{found[aspect]:.3f} of {number}" if number else "no score"
                for found, number in zip(scores, numbers, strict=True)
            ]
            lines.append([f"{_labelled(results[0])}: {escape(aspect)}", *cells])
        lines.append([f"{_labelled(results[0])}: errors of the judge", *(str(r.judge_errors) for r in results)])
    return [f"<h2>Scores of the judge</h2><p>{JUDGED}</p>", _table(["aspect", *models], lines)]


def _bias_section(evaluations: Sequence[Evaluation]) -> list[str]:
    models = [evaluation.model for evaluation in evaluations]
    tasks = zip(*(language_bias(evaluation.results) for evaluation in evaluations), strict=True)
    rows = [(model, bias) for biases in tasks for model, bias in zip(models, biases, strict=True)]
    if not rows:
        return []
    lines = []
    for model, bias in rows:
        shares = [percent(bias.accuracy[hint]) if hint in bias.accuracy else "not asked" for hint in HINTED]
        null = "not asked" if bias.null is None else _of(bias.null)
        lines.append([escape(f"{bias.name}: {model}"), str(bias.follows.n), *shares, percent(bias.follows), null])
    head = ["task", "n", *(f"right {hint}" for hint in HINTED.values()), "follows a wrong hint", "null: without a hint"]
    caption = "Right answers by hint, and how often a wrong hint is followed beside its null, with 95 % intervals."
    return [f"<h2>Language bias</h2><p>{BIAS}</p>", _table(head, lines), chart(_bias_figure(rows), caption)]


def _bias_figure(rows: Sequence[tuple[str, LanguageBias]]) -> Figure:
    figure, axes = new_figure(2, width=9.0, height=1.9 + 0.45 * len(rows))
    for y, (_, bias) in enumerate(rows):
        for k, (hint, label) in enumerate(HINTED.items()):
            _point(axes[0], bias.accuracy.get(hint), y + (k - 1) * 0.2, COLOURS[k], label if not y else "")
        _point(axes[1], bias.follows, y - 0.1, COLOURS[2], "with a wrong hint" if not y else "")
        _point(axes[1], bias.null, y + 0.1, "0.5", "the same questions without a hint (null)" if not y else "")
    axes[0].set_yticks(range(len(rows)), [f"{bias.name}: {model}" for model, bias in rows])
    axes[1].set_yticks(range(len(rows)), [""] * len(rows))
    for axis, title in zip(axes, ("right answers", "answers that a wrong hint suggests"), strict=True):
        axis.set(title=title, xlabel="%", xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
        axis.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / (0.5 + 0.45 * len(rows)))
        )
    return figure


def _point(axis: Any, share: Proportion | None, y: float, colour: str, label: str) -> None:
    """A share and its interval, in per cent."""
    if share is not None:
        axis.plot([100 * end for end in share.interval], [y, y], color=colour, linewidth=1.5)
        axis.plot([100 * share.value], [y], color=colour, marker="o", markersize=5, linestyle="", label=label or None)


def _comparison_section(overall: Comparison | None, by_task: Sequence[Comparison]) -> list[str]:
    comparisons = [*([] if overall is None else [overall]), *by_task]
    if not comparisons:
        return []
    lines = []
    for c in comparisons:
        low, high = c.interval
        verdict = "significant" if c.significant else "no significant difference"
        cells = [str(c.questions.n), f"{c.questions.gained} / {c.questions.lost}", f"{100 * c.difference:+.1f}"]
        cells += [f"{100 * low:+.1f} to {100 * high:+.1f}", f"{c.questions.p:.3g}"]
        cells += [] if c.seeds is None else [f"{c.seeds.p:.3g}"]
        lines.append([escape(c.title), *cells, f"{c.corrected:.3g}, {verdict}"])
    several = comparisons[0].seeds is not None
    head = [
        "",
        "n",
        "gained / lost",
        "difference",
        "95 % interval",
        "McNemar's p",
        *(["t-test's p"] if several else []),
    ]
    caption = "Differences with 95 % intervals; filled where they are significant after correction."
    return [
        f"<h2>Comparison</h2><p>{COMPARED}{f' {SEEDS}' if several else ''}</p>",
        _table([*head, "p, corrected by task"], lines),
        chart(_forest(comparisons), caption),
    ]


def _forest(comparisons: Sequence[Comparison]) -> Figure:
    figure, (axis,) = new_figure(1, width=7.5, height=1.3 + 0.32 * len(comparisons))
    axis.axvline(0, color="0.6", linewidth=1)
    for y, c in enumerate(comparisons):
        axis.plot([100 * end for end in c.interval], [y, y], color=COLOURS[0], linewidth=1.5)
        fill = COLOURS[0] if c.significant else "white"
        axis.plot([100 * c.difference], [y], marker="s", color=COLOURS[0], markerfacecolor=fill)
    axis.set_yticks(range(len(comparisons)), [c.title for c in comparisons])
    axis.set(xlabel="difference in percentage points", ylim=(len(comparisons) - 0.5, -0.5))
    return figure


def _examples_section(evaluations: Sequence[Evaluation]) -> list[str]:
    """Some right and some wrong answers of the first model, and what the others say there."""
    lines = []
    for results in zip(*(evaluation.results for evaluation in evaluations), strict=True):
        first = results[0].answers
        for correct in (None,) if results[0].judged else (True, False):
            for i in [i for i, answer in enumerate(first) if answer.correct is correct][:EXAMPLES]:
                about = [escape(results[0].title), _thumbnail(first[i]), escape(first[i].question)]
                lines.append([*about, escape(first[i].expected), *(_given(result.answers[i]) for result in results)])
    models = [escape(evaluation.model) for evaluation in evaluations]
    return ["<h2>Examples</h2>", _table(["task", "picture", "question", "expected", *models], lines)]


def _given(answer: Answer) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[answer.correct]
    return f"{mark}{escape(answer.given) or '<em>nothing</em>'}"


def _thumbnail(answer: Answer) -> str:
    """The first picture of a question, small."""
    if not answer.images:
        return "none"
    file = io.BytesIO()
    small = load_picture(answer.images[0])
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, format="JPEG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="picture of question {escape(answer.id)}">'
