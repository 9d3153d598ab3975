"""``moda-ext info``, ``demo``, ``bench`` and ``verify``: what is installed, and whether it is right and fast here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import rich
import torch
import typer
from rich.table import Column, Table

import moda_ext
from moda_ext.cli.app import app


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    why: Annotated[bool, typer.Option("--why", help="Also who computes each operator, and why.")] = False,
) -> None:
    """Versions, what the native library was built for, and the instruction set in use."""
    facts = moda_ext.info()
    if as_json:
        print(json.dumps(facts))
        return
    backends = facts.pop("backends")
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, str(value))
    rich.print(table)
    if not why:
        return
    table = Table("operator", "call", "backend", Column("reason", overflow="fold"))
    for op, choices in backends.items():
        for kind, choice in choices.items():
            table.add_row(op, kind, choice["backend"] or "nobody", choice["reason"])
        table.add_section()
    rich.print(table)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("moda_demo.png")) -> None:
    """A photograph and a sentence through one attention layer: checks, times and a picture."""
    from moda_ext.demo import main

    main(["--out", str(out)])


@app.command()
def bench(
    lengths: Annotated[str, typer.Option(help="Sequence lengths, with commas.")] = "512,1024,2048",
    head_dim: Annotated[int, typer.Option(help="D.")] = 128,
    heads: Annotated[int, typer.Option(help="Query heads, four to each key/value head.")] = 8,
    seconds: Annotated[float, typer.Option(help="Time for each figure.")] = 1.0,
) -> None:
    """Times `modular_attention` beside torch's scaled_dot_product_attention on this machine.

    The repository's `python -m benchmarks` has more contenders, checks each against float64, and judges goals.
    """
    from moda_ext.verify.timing import SDPA, attention_times

    if heads % 4:
        raise typer.BadParameter(f"must be a multiple of 4, got {heads}", param_hint="--heads")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table = Table(title=f"median ms on {device.type}, {str(dtype)[6:]}, half of the keys image, causal")
    for column in ("N", "pass", "modular_attention, all on", "SDPA, causal only", "ratio"):
        table.add_column(column, justify="right")
    measured = attention_times(
        [int(length) for length in lengths.split(",")],
        [None],
        heads=heads,
        head_size=head_dim,
        device=device,
        dtype=dtype,
        seconds=seconds,
    )
    for times in measured:
        ours, theirs = 1e3 * times.medians[""], 1e3 * times.medians[SDPA]
        table.add_row(str(times.length), times.what, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}")
    rich.print(table)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def verify(context: typer.Context) -> None:
    """Proves the native operators right on this machine, and keeps a stamp of it; `verify --help` has the options."""
    from moda_ext.verify.__main__ import main

    raise typer.Exit(main(context.args))
