"""examples/train_parallel.py: the same losses and weights whatever holds the model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "train_parallel.py"


def train(out: Path, *launcher: str, options: tuple[str, ...] = ()) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The losses that are printed, and the weights that are saved."""
    command = [sys.executable, *launcher, str(SCRIPT), "--steps", "3", "--out", str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"^step +\d+  loss ([\d.]+)$", done.stdout, re.MULTILINE)
    return [f"{float(loss):.4f}" for loss in losses], load_file(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    losses, weights = train(tmp_path_factory.mktemp("alone") / "moda.safetensors")
    assert len(losses) == 3 and losses[0] > losses[2]
    return losses, weights


@pytest.mark.parametrize("options", [("--tp", "2"), ("--cp", "2"), ("--fsdp",), ("--cp", "2", "--fsdp")], ids=" ".join)
def test_two_processes_train_as_one(alone, options, tmp_path):
    losses, weights = train(
        tmp_path / "moda.safetensors", "-m", "torch.distributed.run", "--nproc-per-node", "2", options=options
    )
    assert losses == alone[0]
    assert weights.keys() == alone[1].keys()
    for name, tensor in alone[1].items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0, msg=name)
