"""Tests in a process of their own: with other variables, or on another instruction set."""

import os
import subprocess
import sys
from pathlib import Path

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


# Instruction sets by ATEN_CPU_CAPABILITY, "": no cap.
TIERS = {"default": "baseline", "avx2": "avx2", "avx512": "avx512", "": "amx"}
ORDER = ("baseline", "avx2", "avx512", "amx")
