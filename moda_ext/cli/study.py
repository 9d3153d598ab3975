"""``moda-ext study``: does MODA help? Variants, seeds and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moda_ext.cli.app import ManyValues, app


@app.command(cls=ManyValues)
def study(
    small: Annotated[Path, typer.Option(help="What moda-ext assemble made.")] = Path("build/small"),
    out: Annotated[Path, typer.Option(help="Gets a file for each run, and README.md.")] = Path("build/study"),
    variants: Annotated[
        list[str] | None, typer.Option(help="By default all; each needs what it is compared with.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many of each variant.")] = 5,
    align_steps: Annotated[int, typer.Option(min=1, help="Of the alignment, once for all.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 100,
    lr: Annotated[float, typer.Option(help="Of LoRA and MODA's low-rank maps.")] = 2e-3,
    fast_lr: Annotated[float, typer.Option(help="Of MODA's priors and conditions.")] = 1e-2,
    prior: Annotated[float, typer.Option(help="At which the variant 'prior' starts, see moda-ext calibrate.")] = 1.0,
    prior_layers: Annotated[str | None, typer.Option(help="Which have it, such as 20-29; by default all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task and hint.")] = 40,
    hints: Annotated[
        list[str] | None, typer.Option(help="Which are asked, by default all; none and wrong must be.")
    ] = None,
    questions: Annotated[str, typer.Option(help="test, or dev to choose learning rates by.")] = "test",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, which share the cores.")] = 1,
) -> None:
    """Trains variants of the small model under the same conditions, and compares their answers and attention.

    Runs that are done are not done again: call it again after an interruption, or with more seeds. Needs the extra
    moda_ext[train].
    """
    import accelerate  # type: ignore[import-untyped]  # noqa: F401  if one is missing, say so first
    import peft  # noqa: F401
    import scipy  # noqa: F401

    from moda_ext.conversations import HINTS
    from moda_ext.study import VARIANTS, Plan, run_study, write_tables

    if questions not in ("test", "dev"):
        raise typer.BadParameter(f"must be test or dev, got {questions}", param_hint="--questions")
    for part in ("model/config.json", f"data/{questions}.jsonl"):
        if not (small / part).is_file():
            raise typer.BadParameter(f"{small / part} is missing: run moda-ext assemble", param_hint="--small")
    hints = hints or list(HINTS)
    if not {"none", "wrong"} <= set(hints) <= set(HINTS):
        raise typer.BadParameter(f"must be none, wrong and maybe right, got {' '.join(hints)}", param_hint="--hints")
    plan = Plan(
        str(small),
        align_steps=align_steps,
        steps=steps,
        lr=lr,
        fast_lr=fast_lr,
        prior=prior,
        prior_layers=_layers(prior_layers),
        limit=limit,
        hints=sorted(set(hints)),
        questions=questions,
    )
    try:
        runs = run_study(out, plan, variants or list(VARIANTS), range(seeds), jobs=jobs)
        tables = write_tables(runs)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    (out / "README.md").write_text(tables, encoding="utf-8")
    print(tables + f"\n{out / 'README.md'}")


def _layers(text: str | None) -> list[int] | None:
    """ "20-29" as [20, 29]."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise typer.BadParameter(f"must be two layers, such as 20-29, got {text}", param_hint="--prior-layers")
    return [int(first), int(last)]
