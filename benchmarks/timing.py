"""Interleaved timing in one process, and the description of the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from datetime import datetime, timezone

import torch

import moda_ext

from .peers import Call, Contender
from .workloads import Inputs

SHORTEST_SAMPLE = 0.01  # seconds; shorter calls are repeated within a sample
SHORT = 0.1  # seconds; the caches that the previous call left matter to a call this short

Samples = list[float | None]  # seconds per call by round


def callable_for(contender: Contender, forward: Call, x: Inputs, mode: str) -> Call:
    """What is timed: the forward without gradients, or forward and backward with respect to everything.

    ``train`` returns the outputs and then the gradients of the contender's leaves. Incoming gradients of all outputs
    are dense and random.
    """
    if mode == "forward":

        def call():
            with torch.no_grad():
                return forward()

        return call
    leaves = x.leaves(contender.leaves)
    upstream = [x.grad[name] for name in contender.outputs]

    def call():
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    return call


def interleave(calls: dict[str, Call], seconds: float, rounds: tuple[int, int]) -> dict[str, Samples]:
    """Time the calls A B C C B A A B C ...; returns the seconds per call of each, one number per round.

    Every call runs twice before anything counts (once if it takes more than a second), and a short one once more
    before each sample, so that nobody pays for the caches its predecessor left. Rounds: what fits into ``seconds``, at
    least ``rounds[0]``, at most ``rounds[1]``. Calls that cost much more than the others sit out rounds (None), but get
    ``rounds[0]`` samples too. Sample k of everyone comes from round k, so ratios may be taken round by round.
    """
    once = {}
    for name, call in calls.items():
        once[name] = clock(call)
        if once[name] < 1.0:
            once[name] = clock(call)
    repeat = {name: max(1, round(SHORTEST_SAMPLE / max(t, 1e-6))) for name, t in once.items()}
    cost = {name: t * (repeat[name] + (t < SHORT)) for name, t in once.items()}
    limit = 4 * min(cost.values())
    period = {name: max(1, int(t / limit)) for name, t in cost.items()}
    total = int(seconds / sum(cost[name] / period[name] for name in calls))
    total = min(rounds[1], max(rounds[0], total))
    samples: dict[str, Samples] = {name: [] for name in calls}
    for index in range(total):
        for name, call in list(calls.items())[:: 1 if index % 2 == 0 else -1]:
            if index % min(period[name], total // rounds[0]):
                samples[name].append(None)
                continue
            if once[name] < SHORT:
                call()
            samples[name].append(clock(call, repeat[name]))
    return samples


def clock(call: Call, repeat: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def taken(samples: Samples) -> list[float]:
    return [t for t in samples if t is not None]


def ratio(ours: Samples, peer: Samples) -> float:
    """Median over the rounds of ours / peer: a disturbance that lasts longer than a round cancels."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True) if a is not None and b is not None)


def keep_memory() -> None:
    """From now on freed memory stays with this process and is used again, whatever the size of a block (glibc).

    By default glibc maps blocks above 32 MB anew in every call. Their page faults start somewhere on the way to long
    sequences, and would look as if the operator's time grew there.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def available_memory() -> float:
    """Bytes that may still be allocated on this machine."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def machine() -> dict:
    """What a reader needs in order to judge the figures."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "moda_ext": moda_ext.info(),
    }
