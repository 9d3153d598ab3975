"""Tests in processes of their own: with other variables, on another instruction set, or several that work together."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from moda_ext.verify.__main__ import ISAS as CAPS

TESTS = Path(__file__).parents[1]


def environment_with(**variables: str) -> dict[str, str]:
    """This process's environment and ``variables``; asking for the fallback takes back a demand for native."""
    environment = {**os.environ, **variables}
    if "MODA_EXT_DISABLE_NATIVE" in variables:
        environment.pop("MODA_EXT_REQUIRE_NATIVE", None)
    return environment


def python(code: str, *arguments: str, **variables: str) -> str:
    """What a fresh interpreter prints; it can import the helpers and the tests, and runs outside the checkout."""
    folders = [str(folder) for folder in TESTS.iterdir() if folder.is_dir()]
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment_with(PYTHONPATH=path, **variables),
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def hide_accelerators(setattr: Callable) -> None:
    """Has what asks torch for an accelerator run on the CPU; ``setattr`` is the built-in one, or monkeypatch's."""
    setattr(torch.accelerator, "is_available", lambda: False)


def run_ranks(function: Callable, world: int, rendezvous: Path, *arguments: object) -> None:
    """``function(*arguments)`` in ``world`` processes that make up a group of gloo."""
    torch.multiprocessing.spawn(_run_rank, (world, str(rendezvous), function, arguments), nprocs=world)


def _run_rank(rank: int, world: int, rendezvous: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    function(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's end aborts, once in some twenty times, where a thread of gloo is not at its own yet


# Instruction sets by ATEN_CPU_CAPABILITY, "": no cap.
TIERS = {cap: isa for isa, cap in CAPS.items() if isa != "neon"} | {"": "amx"}
if platform.machine() in ("aarch64", "arm64"):
    TIERS = {"default": "neon", "": "neon_bf16"}
ORDER = tuple(TIERS.values())
