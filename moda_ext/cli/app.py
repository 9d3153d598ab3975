"""The application ``moda-ext``, and what its commands share."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import torch
import typer

import moda_ext

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=moda_ext.__doc__)


class ManyValues(typer.core.TyperCommand):
    """Lets ``--images a.jpg b.jpg`` stand for ``--images a.jpg --images b.jpg``, as a shell's wildcard writes it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # the context is click's, or a copy in typer
        many = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        expanded, current = [], None
        for arg, after in zip(args, [*args[1:], "--"], strict=True):
            if arg in many:
                if after.startswith("--"):  # such as an empty variable of the shell
                    raise typer.BadParameter("needs a value", param_hint=arg)
                current = arg
            elif arg.startswith("--"):
                current = None
                expanded.append(arg)
            elif current is not None:
                expanded += [current, arg]
            else:
                expanded.append(arg)
        return super().parse_args(ctx, expanded)


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Says in one sentence why a checkpoint cannot be loaded. Some processors need libraries of their own."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot load the checkpoint {name}: {str(error).strip()}") from error


def versions() -> dict[str, str]:
    """Of the software that made a report."""
    import transformers

    return {
        "moda_ext": moda_ext.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
