"""The rate of multiply-adds that this machine reaches with everything in registers, as a call to be timed with others.

A matrix product would be a lower bound only, and a library's; this loop does nothing else. It runs beside what is held
against it, in the same rounds, so that a clock that moves moves both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("multiply_adds.cpp")
OPERATIONS = 2e9  # of one thread in one call: 10 to 50 ms


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "multiply_adds.so"
        compiler = os.environ.get("CXX", "c++").split()
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"]
        subprocess.run([*compiler, *flags, SOURCE, "-o", path], check=True, capture_output=True, text=True)
        library = ctypes.CDLL(str(path))
    library.operations_of_round.restype = ctypes.c_double
    library.multiply_adds.argtypes, library.multiply_adds.restype = [ctypes.c_longlong], ctypes.c_float
    return library


def multiply_adds(threads: int) -> tuple[Callable[[], float], float]:
    """A call that does them on so many threads, and how many GFLOP it does.

    Raises:
        OSError: there is no C++ compiler.
        subprocess.CalledProcessError: it cannot compile for this machine.
    """
    library = _library()
    rounds = int(OPERATIONS / library.operations_of_round())
    pool = ThreadPoolExecutor(threads)  # ctypes lets others run during a call

    def call() -> float:
        return sum(pool.map(library.multiply_adds, [rounds] * threads))

    return call, threads * rounds * library.operations_of_round() / 1e9
