"""The command ``moda-ext``. Needs the extra ``moda_ext[cli]``; :mod:`moda_ext.__main__` says so where it is missing."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich
import rich.console
import rich.markup
import torch
import typer
from rich.progress import Progress
from rich.table import Column, Table

import moda_ext

if TYPE_CHECKING:
    from moda_ext.diagnostics.results import Diagnosis
    from moda_ext.diagnostics.runner import Picture

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=moda_ext.__doc__)


class ManyValues(typer.core.TyperCommand):
    """Lets ``--images a.jpg b.jpg`` stand for ``--images a.jpg --images b.jpg``, as a shell's wildcard writes it."""

    MANY = ("--images", "--prompts")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # the context is click's, or a copy in typer
        expanded, current = [], None
        for arg in args:
            if arg in self.MANY:
                current = arg
            elif arg.startswith("--"):
                current = None
                expanded.append(arg)
            elif current is not None:
                expanded += [current, arg]
            else:
                expanded.append(arg)
        return super().parse_args(ctx, expanded)


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


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="What save_pretrained wrote, with MODA.")],
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    metrics: Annotated[bool, typer.Option("--metrics", help="Attention by layer and modality in /metrics.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also what vLLM prints while it starts.")] = False,
) -> None:
    """Serves a model with MODA by vLLM's OpenAI server. Further options go to vLLM, such as --max-model-len 4096.

    Needs vLLM: pip install "moda_ext[vllm]".
    """
    from moda_ext.integrations.vllm.serve import ServeError, Server, arguments, check, interrupted_by_termination

    console = rich.console.Console(stderr=True)
    status = console.status(f"loading {model}")

    def show(line: str) -> None:
        if verbose or not starting:
            print(line, flush=True)
        elif "] " in line:  # a line of vLLM's log
            status.update(f"loading {model}: {rich.markup.escape(line.rpartition('] ')[2][:100])}")

    starting = True
    try:
        check(model, host, port, context.args)
        words = arguments(model, host, port, metrics, context.args)
        with interrupted_by_termination(), Server(words, host, port, metrics, show) as server:
            console.print(f"starting vLLM for {model}, which takes a minute or two")
            with status:
                server.wait_until_ready()
            starting = False
            console.print(f"serving {server.name()!r} at {server.url}/v1; Ctrl-C ends it")
            server.wait()
    except ServeError as error:
        console.print(f"[red]moda-ext serve[/]: {rich.markup.escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("ended")


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


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Says in one sentence why a checkpoint cannot be loaded. Some processors need libraries of their own."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot load the checkpoint {name}: {str(error).strip()}") from error


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


def versions() -> dict[str, str]:
    """Of the software that made a report."""
    import transformers

    return {
        "moda_ext": moda_ext.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
