"""Stamps: what ``moda-ext verify`` found out about the native operators on a machine, kept for the processes to come.

A stamp holds for the circumstances under which it was made: the bytes of the libraries, the device, its driver and
torch. Under others it is as if it were not there. MODA_EXT_STAMPS names the folder, by default one in the user's cache
directory, so a container or a cluster can bring the stamps of its machines along; MODA_EXT_STAMPS=0 leaves all unread.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from moda_ext._ops import library
from moda_ext._version import __version__

VERIFY = "python -m moda_ext.verify"


def folder() -> Path | None:
    """Where stamps are; None where they are not in use."""
    named = os.environ.get("MODA_EXT_STAMPS")
    if named == "0":
        return None
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    home = Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache"
    return home / "moda_ext" / "stamps" if home.is_absolute() else None  # no home: no stamps


def circumstances(device: torch.device) -> dict[str, str]:
    """All that a proof on this device depends on."""
    common = {"moda_ext": __version__, "libraries": _digest(library.files()), "torch": torch.__version__}
    if device.type == "cpu":
        isa = (library.build_info or {}).get("isa", "")
        return {"device": _processor(), "isa": isa, **common}
    found = torch.cuda.get_device_properties(device)
    capability = f"{found.major}.{found.minor}"
    return {"device": found.name, "capability": capability, "driver": _driver(), **common}


def write(facts: dict[str, str], failures: dict[str, str]) -> Path:
    """Keeps the outcome for every operator: "" where all passed. OSError where the folder cannot be written."""
    home = folder()
    if home is None:
        raise OSError("stamps are not in use: MODA_EXT_STAMPS=0, or no home directory")
    home.mkdir(parents=True, exist_ok=True)
    path = home / _name(facts)
    with tempfile.NamedTemporaryFile("w", dir=home, delete=False) as file:
        json.dump({"circumstances": facts, "failures": failures}, file, indent=1)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)  # a reader sees the old stamp or the new one
    return path


def read(facts: dict[str, str]) -> dict[str, str] | None:
    """The failures that a stamp for these circumstances tells of; None without one."""
    home = folder()
    try:
        stamp = json.loads((home / _name(facts)).read_text()) if home else None
    except (OSError, ValueError, RecursionError):  # none, or one that nobody can read: no proof
        return None
    if not isinstance(stamp, dict) or stamp.get("circumstances") != facts:
        return None
    failures = stamp.get("failures")
    told = isinstance(failures, dict) and all(isinstance(failure, str) for failure in failures.values())
    return failures if told else None


def obstacles_on_cpu(operators: Iterable[str]) -> dict[str, str]:
    """Why native operators are not in use on this CPU: those that were found wrong here. Most often nothing."""
    if not (library.native_loaded and _any("cpu")):
        return {}
    failures = read(circumstances(torch.device("cpu"))) or {}
    return {op: _failed(failures[op], "cpu") for op in operators if failures.get(op)}


def obstacles_on_gpus(operators: Iterable[str]) -> dict[str, str]:
    """Why native operators are not in use on the GPUs of this process: all but those proven right on each of them."""
    if not torch.cuda.is_available():
        return dict.fromkeys(operators, "there is no GPU to use the kernels on")
    reasons: dict[str, str] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        failures = read(circumstances(device)) if _any("cuda") else None
        for op in operators:
            failure = None if failures is None else failures.get(op)
            if failure is None:
                name = torch.cuda.get_device_name(device)
                reason = f"the CUDA kernels are not verified on this {name}: `{VERIFY} --device {device}` does that"
                reasons.setdefault(op, reason)
            elif failure:
                reasons.setdefault(op, _failed(failure, str(device)))
    return reasons


def _failed(failure: str, device: str) -> str:
    return f"the native operator failed `{VERIFY} --device {device}` on this machine: {failure}"


def _any(kind: str) -> bool:
    """Whether there are stamps at all: digests of libraries take time."""
    home = folder()
    try:
        return home is not None and any(name.startswith(f"{kind}-") for name in os.listdir(home))
    except OSError:  # none yet, or one that is not ours to read
        return False


def _name(facts: dict[str, str]) -> str:
    kind = "cuda" if "capability" in facts else "cpu"
    return f"{kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _digest(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    """The version of the kernel module, else that of CUDA which the driver has."""
    try:
        found = re.search(r"Module\s+(\S+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
