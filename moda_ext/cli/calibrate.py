"""``moda-ext calibrate``: a prior without training that repeats wrong hints less."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer
from rich.progress import Progress
from rich.table import Table

from moda_ext.cli.app import app, loading, versions

if TYPE_CHECKING:
    from moda_ext.evaluation.calibration import Calibration


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'random': a tiny random Llava.")],
    data: Annotated[Path, typer.Option(help="Examples: LLaVA-format JSON lines with 'hint' and 'hinted'.")],
    out: Annotated[Path, typer.Option(help="A new directory: the calibrated checkpoint, numbers and a figure.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images; by default that of the data.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="One more range of layers to try, such as 16-29; may be repeated.")
    ] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Heads ranked by gradients, not ranges of layers.")
    ] = False,
    doses: Annotated[str, typer.Option(help="What to add to scores on image keys, with commas.")] = "0.5,1,1.5,2,3",
    tolerance: Annotated[float, typer.Option(min=0, help="Points of accuracy without hints that may be lost.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the split: chosen on half of the questions, judged on the rest.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the accelerator if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Finds a prior, without training, with which a model repeats wrong hints less, and saves the model with it.

    Exit status: 1 if no prior is better within the tolerance; then no checkpoint is saved.
    """
    import matplotlib  # noqa: F401  if one is missing, say so before all the measuring
    import PIL  # noqa: F401
    import scipy  # noqa: F401
    import transformers  # noqa: F401

    from moda_ext.conversations import read_conversations, render
    from moda_ext.diagnostics.runner import load_model
    from moda_ext.evaluation import calibration

    if not out.parent.is_dir():
        raise typer.BadParameter(f"no such directory: {out.parent}", param_hint="--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"is there already, and no empty directory: {out}", param_hint="--out")
    if layers and per_head:
        raise typer.BadParameter("goes without --per-head, which looks at all layers", param_hint="--layers")
    ranges, amounts = [parse_range(text) for text in layers or ()], parse_doses(doses)
    try:
        examples = read_conversations(data, images)
        calibration.check_examples(examples)
        calibration.halve(examples, seed)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    with loading(model):
        loaded, processor = load_model(model, device=device, dtype=dtype)
        dial = calibration.PriorDial(loaded)
        render(processor, examples[0])  # a processor without a chat template
    try:
        places = None if per_head else calibration.layer_places(dial, ranges)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from error
    out.mkdir(exist_ok=True)

    def keep(found: Calibration, complete: bool = False) -> None:
        about = {"model": model, "data": str(data), "seed": seed, "complete": complete}
        record = {**about, **found.to_dict(), "versions": versions()}
        (out / "calibration.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")

    with Progress() as bar:
        found = calibration.calibrate(
            dial,
            processor,
            examples,
            places=places,
            tolerance=tolerance,
            doses=amounts,
            seed=seed,
            batch_size=batch_size,
            progress=functools.partial(bar.track, description="calibrating"),
            keep=keep,  # of hours of measuring nothing is lost if it fails later
        )
    keep(found, complete=True)
    calibration.dose_response(found).savefig(out / "calibration.png", dpi=150)
    print_result(found)
    if found.doses is None:
        rich.print(
            f"[red]no prior is better within {tolerance:g} points of accuracy without hints[/]: no checkpoint is saved"
        )
        print(out / "calibration.png")
        raise typer.Exit(1)
    del dial, loaded  # it has learnable priors in all layers
    loaded, processor = load_model(model, device=device, dtype=dtype)
    calibration.apply_prior(loaded, found.doses)
    loaded.save_pretrained(out)
    processor.save_pretrained(out)
    print(out)


def parse_range(text: str) -> tuple[int, int]:
    """(first, last) of "16-29", both included, or of "16"."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise typer.BadParameter(f"must be a range such as 16-29, got {text!r}", param_hint="--layers")
    return int(match[1]), int(match[2] or match[1])


def parse_doses(text: str) -> list[float]:
    try:
        doses = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"must be numbers with commas, got {text!r}", param_hint="--doses") from error
    if not all(0 < dose < float("inf") for dose in doses):
        raise typer.BadParameter(f"must be above 0 and finite, got {text}", param_hint="--doses")
    return sorted(set(doses))


def print_result(found: Calibration) -> None:
    """The half held out, before and after, with 95 % intervals; and notes where it does not hold what it promised."""
    from moda_ext.evaluation.report import percent

    name = "no better prior" if found.chosen is None else f"{found.chosen.place}, dose {found.chosen.dose:g}"
    table = Table(title="on the half held out; in parentheses: 95 % intervals")
    for column in ("", "n", "as it was", name):
        table.add_column(column, justify="left" if not column else "right")
    before, after = found.before, found.after
    new = {} if after is None else after.proportions()
    for label, old in before.proportions().items():
        table.add_row(label, str(old.n), percent(old), percent(new[label]) if new else "-")
    rich.print(table)
    if after is not None:
        lost = {hint: 100 * (before.accuracy[hint].value - share.value) for hint, share in after.accuracy.items()}
        if lost["none"] > found.tolerance + 1e-9:
            rich.print(
                f"[yellow]note[/]: on the half held out, accuracy without hints falls by {lost['none']:.1f} points, "
                f"more than the tolerance of {found.tolerance:g}, which held where the prior was chosen"
            )
        if lost.get("wrong", 0) > 0:
            rich.print(
                f"[yellow]note[/]: on the half held out, accuracy with wrong hints falls by {lost['wrong']:.1f} "
                "points: what is answered instead of the hint is not right more often"
            )
        if after.objective <= before.objective:
            rich.print("[yellow]note[/]: on the half held out this prior is no better; more examples would tell more")
