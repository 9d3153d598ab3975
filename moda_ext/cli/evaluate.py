"""``moda-ext evaluate``: what a model answers, and how it compares with another."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import rich.markup
import typer
from rich.progress import Progress
from rich.table import Table

from moda_ext.cli.app import ManyValues, app, loading, versions

if TYPE_CHECKING:
    from moda_ext.evaluation import Evaluation, Judge, Task


@app.command(cls=ManyValues)
def evaluate(
    model: Annotated[
        list[str], typer.Option(help="Checkpoint directories or hub ids, such as one for each seed; or 'random'.")
    ],
    tasks: Annotated[
        list[str],
        typer.Option(help="small, mvsa-single, mvsa-multiple, tumemo, hfm, mmrole, or .jsonl files of questions."),
    ],
    compare: Annotated[
        list[str] | None, typer.Option(help="Checkpoints to compare with those of --model, pair by pair.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data of tasks that have a name.")] = None,
    out: Annotated[Path, typer.Option(help="The report; beside it .json (figures) and .jsonl (answers).")] = Path(
        "evaluation.html"
    ),
    limit: Annotated[
        int | None, typer.Option(help="So many questions of each task: the first, or drawn where it has labels.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of an answer; by default 32, and 512 for mmrole.", min=1)
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Interface like OpenAI's, such as http://localhost:8000/v1, for mmrole.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Model there. The key is the environment variable OPENAI_API_KEY.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the accelerator if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Asks models questions about pictures, scores their answers, compares the models, and writes a report."""
    import matplotlib  # noqa: F401  if one is missing, say so before all the asking
    import PIL  # noqa: F401
    import scipy  # noqa: F401
    import transformers  # noqa: F401

    from moda_ext.evaluation import OpenAIJudge, read_tasks, summarize, write_answers, write_report

    if out.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"must end in .html, got {out}", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"no such directory: {out.parent}", param_hint="--out")
    written = {out.with_suffix(suffix).resolve() for suffix in (out.suffix, ".json", ".jsonl")}
    for path in (*map(Path, tasks), *([] if data is None else [data])):
        path = path / "test.jsonl" if path.is_dir() else path
        if path.resolve() in written:
            raise typer.BadParameter(f"would overwrite the questions {path}", param_hint="--out")
    others = compare or []
    if others and len(others) != len(model):
        message = f"needs a checkpoint for each of --model, got {len(others)} for {len(model)}"
        raise typer.BadParameter(message, param_hint="--compare")
    if (judge_url is None) != (judge_model is None):
        raise typer.BadParameter("one needs the other", param_hint="--judge-url, --judge-model")
    try:
        asked = read_tasks(tasks, data, limit)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--tasks") from error
    names = [*model, *others]
    for name in names:  # what the last lacks shows before the first is asked
        check_processor(name)
    evaluations: list[Evaluation] = []
    for name, short in zip(names, short_names(names), strict=True):
        evaluations.append(
            ask(name, short, asked, device=device, dtype=dtype, batch_size=batch_size, max_new_tokens=max_new_tokens)
        )
        write_answers(out.with_suffix(".jsonl"), evaluations)  # nothing is lost if the next one fails
    if judge_url is not None and judge_model is not None:
        judge = OpenAIJudge(judge_url, judge_model)
        try:
            for i, evaluation in enumerate(evaluations):
                for scored in judged(evaluation, asked, judge):
                    evaluations[i] = scored
                    write_answers(out.with_suffix(".jsonl"), evaluations)
        except ConnectionError as error:
            message = f"{error}; the answers are in {out.with_suffix('.jsonl')}"
            raise typer.BadParameter(message, param_hint="--judge-url") from error
    before, after = evaluations[: len(model)], evaluations[len(model) :]
    notes = ["The weights of the model 'random' are random: its answers say nothing about any real model."]
    notes = notes if "random" in names else []
    command = shlex.join(["moda-ext", *sys.argv[1:]])
    write_report(out, before, after, notes=notes, versions=versions(), command=command)
    print_accuracies(evaluations)
    for sentence in summarize(before, after):
        print(sentence)
    for sentence in notes:
        rich.print(f"[yellow]note[/]: {rich.markup.escape(sentence)}")
    print("\n".join(str(out.with_suffix(suffix)) for suffix in (out.suffix, ".json", ".jsonl")))


def check_processor(name: str) -> None:
    """Whether a checkpoint has what writes conversations for it, before anything heavy."""
    from moda_ext.diagnostics.runner import load_processor

    with loading(name):
        processor = load_processor(name)
        if processor is not None and not getattr(processor, "chat_template", None):
            raise ValueError("its processor has no chat template, so no question can be written for it")


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path or id, with a number where it was there before."""
    shorts = [Path(name).name or name for name in names]
    counts = [shorts[: i + 1].count(short) for i, short in enumerate(shorts)]
    return [short if count == 1 else f"{short} ({count})" for short, count in zip(shorts, counts, strict=True)]


def ask(
    name: str,
    short: str,
    tasks: Sequence[Task],
    *,
    device: str | None,
    dtype: str,
    batch_size: int,
    max_new_tokens: int | None,
) -> Evaluation:
    """Loads a model and asks it all tasks."""
    from moda_ext.diagnostics.runner import load_model
    from moda_ext.evaluation import Evaluation, evaluate

    with loading(name):
        model, processor = load_model(name, device=device, dtype=dtype)
    results = []
    with Progress() as bar:
        for task in tasks:
            track = functools.partial(bar.track, description=rich.markup.escape(f"{short}: {task.title}"))
            results.append(
                evaluate(model, processor, task, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=track)
            )
    return Evaluation(short, tuple(results))


def judged(evaluation: Evaluation, tasks: Sequence[Task], judge: Judge) -> Iterator[Evaluation]:
    """An evaluation with the judge's scores, after each task that it has scored."""
    from moda_ext.evaluation import Evaluation, judge_answers

    results = list(evaluation.results)
    with Progress() as bar:
        for i, task in enumerate(tasks):
            if task.judged:
                track = functools.partial(bar.track, description=rich.markup.escape(f"judge: {task.title}"))
                results[i] = judge_answers(results[i], task, judge, progress=track)
                yield Evaluation(evaluation.model, tuple(results))


def print_accuracies(evaluations: Sequence[Evaluation]) -> None:
    """The accuracy of each task with its interval, beside chance; and the judge's scores of those that have one."""
    from moda_ext.evaluation.report import percent

    models = [evaluation.model for evaluation in evaluations]
    exact = _table("right answers; in parentheses: 95 % interval", ("task", "n", "chance", *models))
    judged = _table("evaluated / reference, mean over aspects; in parentheses: verdicts", ("task", "n", *models))
    for results in zip(*(evaluation.results for evaluation in evaluations), strict=True):
        first = results[0]
        name, number = rich.markup.escape(first.title), str(len(first.answers))
        if first.judged:
            means = [f"{sum(s.values()) / len(s):.3f}" if (s := r.judged_scores()) else "no score" for r in results]
            shares = [f"{r.verdicts - r.judge_errors} of {r.verdicts}" for r in results]
            judged.add_row(name, number, *(f"{m} ({s})" for m, s in zip(means, shares, strict=True)))
        else:
            chance = "" if first.chance is None else f"{100 * first.chance:.1f} %"
            cells = [percent(r.accuracy) + (" at chance" if r.at_chance else "") for r in results]
            exact.add_row(name, number, chance, *cells)
    for table in (exact, judged):
        if table.row_count:
            rich.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(rich.markup.escape(column), justify="left" if column == "task" else "right")
    return table
