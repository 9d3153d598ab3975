"""The study in tables: what each variant reaches, and how it differs from the baseline."""

from __future__ import annotations

import json
import math
import statistics as plain
from collections.abc import Callable, Sequence

from moda_ext.evaluation.statistics import ALPHA, Proportion, SeedsDifference, holm, seeds_difference
from moda_ext.study.runs import Run
from moda_ext.study.variants import VARIANTS

__all__ = ["by_variant", "differences", "write_tables"]

TITLES = {"none": "right, no hint", "right": "right hint", "wrong": "wrong hint"}


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each variant by seed, in the order of ``VARIANTS``."""
    found = {name: sorted((r for r in runs if r.variant == name), key=lambda r: r.seed) for name in VARIANTS}
    return {name: group for name, group in found.items() if group}


def differences(runs: Sequence[Run], measure: Callable[[Run], float]) -> dict[str, SeedsDifference]:
    """How each variant differs from the one that it changes: mean over the seeds that both have, with its t interval.

    Args:
        runs: of the study, those that others are compared with among them.
        measure: a figure of a run.

    Raises:
        ValueError: a variant that shares fewer than two seeds with the one that it is compared with.
    """
    found = {}
    for name, pairs in _pairs(runs).items():
        found[name] = seeds_difference([measure(after) - measure(before) for before, after in pairs])
    return found


def _pairs(runs: Sequence[Run]) -> dict[str, list[tuple[Run, Run]]]:
    """Of each variant but the baseline: (the run that it is compared with, its own) of each seed that both have."""
    groups = by_variant(runs)
    found = {}
    for name, group in groups.items():
        against = VARIANTS[name].against
        if against is not None:
            base = {run.seed: run for run in groups.get(against, [])}
            found[name] = [(base[run.seed], run) for run in group if run.seed in base]
    return found


def write_tables(runs: Sequence[Run]) -> str:
    """The tables, in Markdown.

    Raises:
        ValueError: no runs, or runs of several plans.
    """
    if not runs:
        raise ValueError("study: no runs")
    plans = {json.dumps({**run.plan, "small": None}, sort_keys=True) for run in runs}
    if len(plans) > 1:
        raise ValueError(f"study: the runs are of {len(plans)} plans")
    return "\n\n".join([_accuracies(runs), _compared(runs), _tasks(runs), _deficits(runs)]) + "\n"


def _accuracies(runs: Sequence[Run]) -> str:
    """Means over seeds, with their standard deviations."""
    hints = [hint for hint in TITLES if any(name.endswith(f"/{hint}") for name in runs[0].outcomes)]
    lines = []
    for name, group in by_variant(runs).items():
        cells = [_spread([100 * run.accuracy(hint) for run in group]) for hint in hints]
        cells += [_spread([100 * run.following(hint) for run in group]) for hint in ("wrong", "none")]
        loss, seconds = _spread([run.loss for run in group], 3), plain.mean(run.seconds for run in group)
        lines.append([name, len(group), *cells, loss, f"{group[0].trained:,}", f"{seconds:.0f}"])
    head = ["variant", "seeds", *(TITLES[hint] for hint in hints), "follows a wrong hint", "chance of that"]
    return _table([*head, "loss", "trained numbers", "CPU s"], lines)


def _compared(runs: Sequence[Run]) -> str:
    """Differences in points; p by Student's t over seeds, after Holm's correction over variants."""
    pairs = _pairs(runs)
    if not pairs or min(map(len, pairs.values())) < 2:
        return "Fewer than two seeds of each: no comparison."
    measures: dict[str, Callable[[Run], float]] = {
        "right, no hint": lambda run: 100 * run.accuracy("none"),
        "follows a wrong hint": lambda run: 100 * run.following(),
    }
    columns = {title: differences(runs, measure) for title, measure in measures.items()}
    lines = []
    for name in pairs:
        cells: list[object] = [f"{name} against {VARIANTS[name].against}"]
        for found in columns.values():
            p = dict(zip(found, holm([difference.p for difference in found.values()]), strict=True))[name]
            low, high = found[name].interval
            small = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
            verdict = small if p < ALPHA else "no significant difference"
            cells += [f"{found[name].mean:+.1f} ({low:+.1f} to {high:+.1f})", verdict]
        lines.append(cells)
    head = ["points (95 %)"]
    for title in columns:
        head += [title, "after Holm"]
    return _table(head, lines)


def _tasks(runs: Sequence[Run]) -> str:
    """Accuracy without hints of each task, mean over seeds; the interval is of one seed's number of questions."""
    groups = by_variant(runs)
    lines = []
    for task, group in runs[0].groups.items():
        chance = runs[0].chance[task]
        cells: list[object] = [f"{task} ({group})", f"{100 * chance:.0f}"]
        for found in groups.values():
            outcomes = [run.outcomes[f"{task}/none"] for run in found]
            right = sum(o.count("1") for o in outcomes) / len(outcomes)
            share = Proportion(round(right), len(outcomes[0]))  # seeds are asked the same questions
            low, high = share.interval
            mark = "" if low > chance else ", below chance" if high < chance else ", at chance"
            cells.append(f"{100 * right / share.n:.0f} ({100 * low:.0f} to {100 * high:.0f}{mark})")
        lines.append(cells)
    return _table(["right, no hint, % (95 %)", "chance", *groups], lines)


def _deficits(runs: Sequence[Run]) -> str:
    """AvgDiff and MDI, beside uniform attention, and what the prior of text rows for image keys became."""
    groups = by_variant(runs)
    names = [name for name in next((run.deficit for run in runs if run.deficit), {}) if not name.endswith("_uniform")]
    lines = []
    for name, group in groups.items():
        cells: list[object] = [name]
        for figure in names:
            values, null = ([run.deficit.get(f"{figure}{end}", math.nan) for run in group] for end in ("", "_uniform"))
            cells.append("not defined" if math.isnan(sum(values)) else f"{_spread(values, 3)} ({plain.mean(null):.3f})")
        priors = [run.prior for run in group if run.prior is not None]
        lines.append([*cells, _spread(priors, 3) if priors else "none"])
    return _table(["mean (uniform attention)", *names, "prior of text for image, mean"], lines)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{plain.mean(values):.{digits}f} ± {plain.stdev(values):.{digits}f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
