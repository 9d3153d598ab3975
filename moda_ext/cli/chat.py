"""``moda-ext chat``: a conversation with a model, in the terminal or from a script."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moda_ext.cli.app import app, loading

if TYPE_CHECKING:
    from torch import Tensor

    from moda_ext.chat import AnswerAttention, ChatSession
    from moda_ext.diagnostics import Picture

HELP = """\
/image PATH         adds a picture to the next question
/attention on|off   after each answer, where it looked
/system TEXT        the system message; without a text there is none
/reset              forgets the conversation
/save FILE          writes the conversation as a line of JSON, in LLaVA's format
/help               these lines
/quit               ends, as Ctrl-D does; Ctrl-C stops an answer
Everything else is a question."""
CELLS = 16  # of a side of a drawn map, at most: two of them fit beside one another
SHADES = ((0.25, " "), (0.75, "░"), (1.5, "▒"), (3.0, "▓"), (float("inf"), "█"))  # below, times the picture's mean


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'random': a tiny random Llava.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture for the first question; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Asks this alone, and ends.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="After each answer, where it looked.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Samples from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the accelerator if any.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Talks with a vision-language model about pictures. Questions come from the terminal, or one a line from stdin."""
    import torch

    from moda_ext.chat import ChatSession, model_notes
    from moda_ext.diagnostics import load_model

    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"must be above 0 and at most 1, got {top_p}", param_hint="--top-p")
    try:
        pictures = [readable(path) for path in image or []]
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--image") from error
    with loading(model):
        loaded, processor = load_model(model, device=device, dtype=dtype)
    torch.manual_seed(seed)
    session = ChatSession(
        loaded, processor, system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    )
    terminal = Terminal(session, pictures, attention)
    for sentence in model_notes(loaded, model):
        terminal.say(sentence)
    if prompt is None:
        terminal.run()
    elif not terminal.ask(prompt):
        raise typer.Exit(1)


def readable(path: str | Path) -> Path:
    """The path of a picture.

    Raises:
        OSError: in one sentence, there is no such file or it is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with Image.open(path) as file:
            file.load()
    except UnidentifiedImageError as error:
        raise OSError(f"not an image: {path}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # cut off, a broken PNG, or enormous
        raise OSError(f"cannot read the image {path}: {error}") from error
    return path


class Terminal:
    """Questions and commands, line by line. Answers go to stdout, all that is said about them to stderr."""

    def __init__(self, session: ChatSession, pictures: list[Path], attention: bool):
        self.session, self.pictures, self.attention = session, pictures, attention
        self.out, self.err = Console(highlight=False), Console(stderr=True, highlight=False)
        self.going = True

    def say(self, sentence: str) -> None:
        self.err.print(Text(sentence, style="dim"), soft_wrap=True)

    def run(self) -> None:
        """Until /quit, the end of the input, or Ctrl-C where a question is waited for."""
        if sys.stdin.isatty():
            self.say("/help lists the commands")
        with contextlib.suppress(KeyboardInterrupt):
            for line in self.lines():
                if line.startswith("/"):
                    self.command(*line[1:].partition(" ")[::2])
                elif line:
                    self.ask(line)
                if not self.going:
                    return

    def lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from map(str.strip, sys.stdin)
            return
        with contextlib.suppress(EOFError):
            while True:
                yield self.err.input("> ").strip()

    def ask(self, question: str) -> bool:
        """Whether there is an answer: printed as it is written, a wrong question's reason otherwise."""
        pictures, self.pictures = self.pictures, []
        try:
            with contextlib.closing(self.session.ask(question, pictures)) as pieces:
                for piece in pieces:
                    print(visible(piece) if self.out.is_terminal else piece, end="", flush=True)
        except KeyboardInterrupt:
            self.say("\nstopped")
            return True
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: out of memory
            self.say(str(error))
            self.pictures = pictures
            return False
        self.out.print()
        if self.attention:
            self.show_attention()
        return True

    def command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        try:
            match name:
                case "image" if argument:
                    self.pictures.append(readable(argument))
                    self.say(f"the next question has {len(self.pictures)} picture(s)")
                case "attention" if argument in ("on", "off"):
                    self.attention = argument == "on"
                case "system":
                    self.session.system = argument or None
                case "reset" if not argument:
                    self.session.reset()
                    self.pictures = []
                case "save" if argument:
                    self.save(Path(argument).expanduser())
                case "help":
                    self.say(HELP)
                case "quit" if not argument:
                    self.going = False
                case _:
                    self.say(f"no such command: /{name} {argument}".rstrip() + "; /help lists them")
        except (OSError, ValueError) as error:
            self.say(str(error))

    def save(self, path: Path) -> None:
        from moda_ext.conversations import write_conversations

        if path.exists():
            raise FileExistsError(f"is there already: {path}")
        record = self.session.record()  # before there is a file
        write_conversations(path, [record])
        self.say(f"saved {path}")

    def show_attention(self) -> None:
        try:
            found = self.session.attention()
        except (RuntimeError, ValueError) as error:
            self.say(str(error))
            return
        self.out.print(shares_table(found))
        for picture in found.maps:
            if picture is not None:
                self.out.print(attention_map(picture))
        for sentence in found.notes:
            self.say(sentence)


def visible(text: str) -> str:
    """Without the control characters by which a model could steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def shares_table(found: AnswerAttention) -> Table:
    """The share of each picture, of the text and of the sink, beside uniform attention."""
    table = Table(title="where the answer looked, % of its attention")
    for column in ("", "model", "uniform"):
        table.add_column(column, justify="right" if column else "left")
    names = [f"picture {k + 1}" for k in range(len(found.shares.pictures))]
    ours, uniform = ([*shares.pictures, shares.text, shares.sink] for shares in (found.shares, found.uniform))
    for name, share, even in zip([*names, "text", "no token"], ours, uniform, strict=True):
        table.add_row(name, f"{100 * abs(share):.1f}", f"{100 * abs(even):.1f}")  # of a sink that is 0, within rounding
    return table


def attention_map(picture: Picture) -> Table:
    """Where in a picture, as shades, beside uniform attention; both relative to the mean of the picture's tokens."""
    table = Table(title=Text(picture.title), caption="▒ about the mean of the picture's tokens, █ 3 times it or more")
    table.add_column("model")
    table.add_column("uniform")
    table.add_row(*(Text(shaded(values, picture.grid)) for values in (picture.scores, picture.uniform)))
    return table


def shaded(values: Tensor, grid: tuple[int, int]) -> str:
    """A character, twice, for each cell of a grid of (h * w,) weights, or for the mean of several where it is large."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    cells = adaptive_avg_pool2d(values.reshape(1, *grid), (min(grid[0], CELLS), min(grid[1], CELLS)))[0]
    relative = cells / values.mean().clamp(min=torch.finfo(values.dtype).tiny)  # a hidden picture has none
    return "\n".join(
        "".join(2 * next(shade for below, shade in SHADES if cell < below) for cell in row) for row in relative.tolist()
    )
