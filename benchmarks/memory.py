"""Peak memory of one call beyond its inputs and outputs, measured in a process of its own (Linux).

The process makes the inputs, runs a short call so that code and threads are there, resets the kernel's high-water mark
(writes 5 to /proc/self/clear_refs) and runs the call once. Extra = high-water mark - memory before - size of outputs.
Outputs are out, lse and mass, and with ``train`` the gradients of all inputs, bias and sink included.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import torch

from .peers import OURS
from .timing import callable_for
from .workloads import growth_case, make_inputs


def status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(n: int, mode: str) -> float:
    """Extra bytes of one call of ``ours`` at length ``n``; an upper bound where the mark cannot be reset."""
    ours = OURS[0]
    for case in (growth_case(256), growth_case(n)):
        inputs = make_inputs(case)
        inputs.require_grad(mode == "train")
        call = callable_for(ours, ours.build(case, inputs), inputs, mode)
        if case.num_keys == n:
            break
        call()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    outputs = call()
    return status("VmHWM") - before - sum(t.numel() * t.element_size() for t in outputs)


def measure_in_subprocess(n: int, mode: str) -> float | None:
    """Extra megabytes (10^6 bytes), or None where /proc is missing."""
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-m", "benchmarks.memory", str(n), mode, str(torch.get_num_threads())]
    # glibc would keep freed blocks of up to 32 MB, and the call would find them there: every block its own mapping.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1]) / 1e6


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
