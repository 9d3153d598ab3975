"""``moda-ext train``: a recipe to a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from moda_ext.cli.app import app, loading


@contextlib.contextmanager
def naming_the_recipe() -> Iterator[None]:
    """Says in one sentence what is wrong with it, or with its data."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="RECIPE") from error


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/small_cpu.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of it, such as stages.instruct.lr=1e-4.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Trains a vision-language model with MODA as a recipe says. Called again, it goes on where it was interrupted.

    Needs the extra moda_ext[train]. On several GPUs: torchrun --nproc-per-node 8 -m moda_ext train RECIPE.
    """
    import accelerate  # type: ignore[import-untyped]  # noqa: F401  if one is missing, say so first
    import peft  # noqa: F401

    from moda_ext.diagnostics.runner import load_processor
    from moda_ext.training import read_recipe
    from moda_ext.training.run import begin, is_first_process, run_stages

    with naming_the_recipe():
        read = read_recipe(recipe, overrides or [])
    with loading(read.model):
        load_processor(read.model)
    with naming_the_recipe():
        data = begin(read)
    output = run_stages(read, data, progress=not quiet)
    if is_first_process():
        print(output)
