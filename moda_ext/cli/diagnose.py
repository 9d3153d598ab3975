"""``moda-ext diagnose``: how a model shares its attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import rich.markup
import typer
from rich.progress import Progress
from rich.table import Table

from moda_ext.cli.app import ManyValues, app, loading, versions

if TYPE_CHECKING:
    from moda_ext.diagnostics.results import Diagnosis
    from moda_ext.diagnostics.runner import Picture


@app.command(cls=ManyValues)
def diagnose(
    model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'random': a tiny random Llava.")],
    images: Annotated[list[Path], typer.Option(help="Image files, or directories of them.")],
    prompts: Annotated[list[str], typer.Option(help="Questions, each asked about each image; or .txt files of them.")],
    out: Annotated[Path, typer.Option(help="The report; the numbers go beside it, as .json.")] = Path("report.html"),
    compare: Annotated[str | None, typer.Option(help="A second checkpoint, such as one with MODA.")] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate for each question, measured too; MDI as published needs 2 or more.")
    ] = 0,
    pictures: Annotated[int, typer.Option(help="For how many questions to draw where the text looks.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the accelerator if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Measures how a vision-language model shares its attention between text and images, and writes a report."""
    import matplotlib  # noqa: F401  if one is missing, say so before all the measuring
    import PIL  # noqa: F401
    import transformers  # noqa: F401

    from moda_ext.diagnostics.report import write_report
    from moda_ext.diagnostics.runner import diagnose, find_images, load_model, load_processor

    if out.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"must end in .html, got {out}", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"no such directory: {out.parent}", param_hint="--out")
    try:
        files, questions = find_images(images), read_prompts(prompts)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    diagnoses: list[Diagnosis] = []
    drawn: list[tuple[str, Picture]] = []
    notes: list[str] = []
    names = [model] if compare is None else [model, compare]
    for name in names:  # what the second lacks shows before the first is measured
        with loading(name):
            load_processor(name)
    for name in names:
        with loading(name):
            loaded, processor = load_model(name, device=device, dtype=dtype)
        short = Path(name).name or name
        if any(d.name == short for d in diagnoses):
            short = f"{short} (2)"
        with Progress() as bar:
            diagnosis, found, said = diagnose(
                loaded,
                processor,
                files,
                questions,
                name=short,
                new_tokens=new_tokens,
                num_pictures=pictures,
                progress=functools.partial(bar.track, description=short),
            )
        diagnoses.append(diagnosis)
        drawn += [(short, picture) for picture in found]
        notes += [sentence for sentence in said if sentence not in notes]
        del loaded
    if model == "random":
        notes.append("The weights of the model 'random' are random: these figures say nothing about any real model.")
    write_report(out, diagnoses, drawn, notes, versions())
    data = out.with_suffix(".json")
    (diagnoses[0] if compare is None else diagnoses[0].compare(diagnoses[1])).to_json(data)
    print_summary(diagnoses)
    for sentence in dict.fromkeys([*(s for d in diagnoses for s in d.undefined()), *notes]):
        rich.print(f"[yellow]note[/]: {rich.markup.escape(sentence)}")
    print(f"{out}\n{data}")


def read_prompts(prompts: list[str]) -> list[str]:
    """Prompts, with those in .txt files, one a line."""
    found = []
    for prompt in prompts:
        if prompt.endswith(".txt"):
            found += [line.strip() for line in Path(prompt).read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            found.append(prompt)
    return found


def print_summary(diagnoses: Sequence[Diagnosis]) -> None:
    """AvgDiff and MDI beside uniform attention, and MDI as published where there are generated tokens."""
    table = Table(title="on rows that see every modality; in parentheses: uniform attention")
    table.add_column("")
    for diagnosis in diagnoses:
        table.add_column(diagnosis.name, justify="right")
    for measure, label, scale, unit in (("avg_diff", "AvgDiff", 100, " %"), ("mdi", "MDI, text over", 1, "")):
        for name in diagnoses[0].modalities[measure == "mdi" :]:
            cells = []
            for diagnosis in diagnoses:
                value, null = (scale * diagnosis.summary(null=null)[measure][name] for null in (False, True))
                cells.append("not defined" if value != value else f"{value:.2f}{unit} ({null:.2f}{unit})")
            table.add_row(f"{label} {name}", *cells)
    rich.print(table)
    if not any(diagnosis.generated_tokens for diagnosis in diagnoses):
        return
    table = Table(title="MDI as generated tokens see their prompts; in parentheses: uniform attention")
    table.add_column("")
    for diagnosis in diagnoses:
        table.add_column(diagnosis.name, justify="right")
    for m, name in enumerate(diagnoses[0].modalities[1:], start=1):
        for third, label in enumerate(("early", "middle", "late")):
            cells = []
            for diagnosis in diagnoses:
                value, null = (diagnosis.thirds("mdi", null=null)[third, m].item() for null in (False, True))
                cells.append("not defined" if value != value else f"{value:.2f} ({null:.2f})")
            table.add_row(f"{label} layers, text over {name}", *cells)
    rich.print(table)
