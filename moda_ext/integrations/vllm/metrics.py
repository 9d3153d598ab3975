"""How much attention each modality gets while a server runs, as metrics of Prometheus.

The model runs in another process than the server that answers ``/metrics``. They meet in files, the multiprocess mode
of ``prometheus_client``: every process writes into PROMETHEUS_MULTIPROC_DIR, the server adds up.
"""

from __future__ import annotations

import functools
import os

import torch
from prometheus_client import Counter
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank

__all__ = ["SETTING", "AttentionMass", "Meter"]

SETTING = "moda_metrics"  # in vLLM's additional_config
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


@functools.cache  # one of a name in a process, and none where nobody asked
def counters() -> tuple[Counter, Counter]:
    mass = Counter(
        "moda_attention_mass",
        "Attention of rows of modality `query` to keys of `modality`: the mean over heads, the sum over rows. Divided "
        "by moda_attention_rows_total it is their share; what is missing to 1 went to the sink.",
        ("layer", "query", "modality"),
    )
    rows = Counter("moda_attention_rows", "Rows that moda_attention_mass_total is summed over.", ("layer", "query"))
    return mass, rows


def missing_directory() -> str | None:
    """Why the metrics could not be seen, None if they can."""
    if os.environ.get(DIRECTORY):
        return None
    return (
        f"{SETTING} needs {DIRECTORY}, an empty folder, set before vLLM is started; moda-ext serve --metrics does that"
    )


class AttentionMass:
    """The sums of one layer, on the device of the model.

    Args:
        num_modalities: M.
        num_heads: of all tensor-parallel ranks.
        device: of the model.
    """

    def __init__(self, num_modalities: int, num_heads: int, device: torch.device):
        self.share = 1.0 / num_heads
        # [of rows of this modality, on keys of that one], and in the last column how many rows there were
        self.sums = torch.zeros(num_modalities, num_modalities + 1, dtype=torch.float64, device=device)

    def add(self, mass: Tensor, modality: Tensor, rows: Tensor) -> None:
        """One step. Nothing here waits for the device.

        Args:
            mass: (T, Hq, M).
            modality: (T,), of the rows.
            rows: how many of them are no padding, a tensor of one number.
        """
        place = torch.arange(len(modality), device=modality.device)
        members = (modality[:, None] == torch.arange(len(self.sums), device=modality.device)) & (place < rows)[:, None]
        each = torch.nn.functional.pad(mass.sum(dim=1).double() * self.share, (0, 1), value=1.0)
        self.sums += members.double().T @ each


class Meter:
    """Publishes the sums of all layers.

    Args:
        names: of the modalities.
        layers: by layer index.
    """

    def __init__(self, names: tuple[str, ...], layers: dict[int, AttentionMass]):
        self.names, self.layers = names, layers
        self.rank = get_tensor_model_parallel_rank()
        self.published = torch.zeros(len(layers), len(names), len(names) + 1, dtype=torch.float64)
        self.copied: torch.Tensor | None = None
        self.ready: torch.cuda.Event | None = None

    def publish(self) -> None:
        """Called after each step. On a GPU what is published is that of an earlier step, for which nobody waits."""
        if self.ready is None or self.ready.query():
            if self.copied is not None:
                self._count(self.copied)
            sums = torch.stack([layer.sums for layer in self.layers.values()])
            if sums.is_cuda:
                self.copied = sums.to("cpu", non_blocking=True)
                self.ready = torch.cuda.Event()
                self.ready.record()
            else:
                self._count(sums)

    def _count(self, sums: Tensor) -> None:
        total_mass, total_rows = counters()
        for layer, of_rows in zip(self.layers, (sums - self.published).tolist(), strict=True):
            for query, counts in zip(self.names, of_rows, strict=True):
                if not counts[-1]:
                    continue
                for modality, mass in zip(self.names, counts, strict=False):
                    total_mass.labels(layer, query, modality).inc(mass)
                if self.rank == 0:  # the others have other heads of the same rows
                    total_rows.labels(layer, query).inc(counts[-1])
        self.published = sums
