"""Processes that make up a group of gloo and stay for many checks: starting them costs more than most checks take."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

PATIENCE = 45.0  # seconds: for a collective, and for one check; a rank that died ends its check at once
START = 240.0  # seconds: for the server to import, on a machine that has other things to do
GRACE = 3.0  # seconds that the other ranks get to tell their errors
DIED = "died"  # is told before errors, and errors of a rank's own before those of collectives that lost a rank
PRELOADED = ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint", "peft"]
PRELOADED += ["moda_ext.diagnostics", "moda_ext.integrations.transformers"]  # those that are not there are left out


class Ranks:
    """``run`` calls a function in each of ``world`` processes, which find their group in ``torch.distributed``.

    The first call starts them, forked from a server that has imported the libraries. After an error they are ended, and
    the next call starts anew: nobody is left in a collective.
    """

    def __init__(self, world: int):
        self.world = world
        self.processes: list[Any] = []
        self.pipes: list[multiprocessing.connection.Connection] = []

    def run(self, function: Callable, *arguments: object, patience: float = PATIENCE) -> list[Any]:
        """What ``function(*arguments)`` returns in each rank, plain data. A function of a module, found by its name.

        Raises:
            AssertionError: with the traceback of the rank that failed first, died or did not answer.
        """
        if not self.processes:
            self._start()
        failures: dict[int, str] = {}
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((sys.path, function.__module__, function.__qualname__, arguments))
            except BrokenPipeError:
                failures[rank] = self._died(rank)
        return self._answers(failures, patience)

    def _answers(self, failures: dict[int, str], patience: float) -> list[Any]:
        """What every rank sends, in their order."""
        results: dict[int, Any] = {}
        deadline = time.monotonic() + patience
        while len(results) + len(failures) < self.world:
            waiting = [rank for rank in range(self.world) if rank not in results and rank not in failures]
            watched = {self.pipes[rank]: rank for rank in waiting}
            watched |= {self.processes[rank].sentinel: rank for rank in waiting}
            ready = multiprocessing.connection.wait(watched, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= {rank: f"gave no answer in {patience:.0f} s" for rank in waiting if not failures}
                break
            for rank in sorted({watched[item] for item in ready}):
                self._receive(rank, results, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            self.stop(at_once=True)
            ordered = sorted(failures, key=lambda rank: (not failures[rank].startswith(DIED), "gloo" in failures[rank]))
            raise AssertionError("\n".join(f"rank {rank} of {self.world}: {failures[rank]}" for rank in ordered))
        return [results[rank] for rank in range(self.world)]

    def _receive(self, rank: int, results: dict[int, Any], failures: dict[int, str]) -> None:
        """Takes a rank's answer, or notes that it died."""
        try:
            fine, value = self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            failures[rank] = self._died(rank)
            return
        if fine:
            results[rank] = value
        else:
            failures[rank] = value

    def _died(self, rank: int) -> str:
        self.processes[rank].join()
        return f"{DIED} with exit code {self.processes[rank].exitcode}"

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory(prefix="moda_ext_ranks_")
        rendezvous = os.path.join(self.folder.name, "rendezvous")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the server imports by it
        try:
            for rank in range(self.world):
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(rank, self.world, rendezvous, there), daemon=True)
                process.start()
                there.close()  # so that the pipe ends with the process
                self.processes.append(process)
                self.pipes.append(here)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        self._answers({}, START)

    def stop(self, at_once: bool = False) -> None:
        """Ends the processes: by themselves, or where one of them may wait for others, at once."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            pipe.close()  # what they wait for
            if at_once:
                process.kill()
        for process in self.processes:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.pipes = [], []


def serve(rank: int, world: int, rendezvous: str, pipe: multiprocessing.connection.Connection) -> None:
    """The life of a rank: checks come through the pipe until it is closed."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    pipe.send((True, None))  # it is there
    while True:
        try:
            sys.path[:], module, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            answer = (True, getattr(__import__(module), name)(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's end aborts, once in some twenty times, where a thread of gloo is not at its own yet
