"""``moda-ext serve``: an OpenAI server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import rich.console
import rich.markup
import typer

from moda_ext.cli.app import app


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
