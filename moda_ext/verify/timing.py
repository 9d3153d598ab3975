"""How long attention takes here: ours on the backends in question, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moda_ext._ops.backend import use_backend
from moda_ext.functional.attention import modular_attention

SDPA = "SDPA"
PASSES = {
    "forward": "with torch.no_grad():\n    call()",
    "forward + backward": "call().sum().backward()",
}


class Times(NamedTuple):
    length: int
    what: str  # one of PASSES
    medians: dict[str, float]  # seconds, by backend, and SDPA


def attention_times(
    lengths: Sequence[int],
    backends: Sequence[str | None],
    *,
    heads: int,
    head_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> Iterator[Times]:
    """Medians for each length and pass: causal, half of the keys image, bias, sink, lse and mass on; SDPA only causal.

    ``backends``: None is whatever is in use; ``seconds`` are for each figure.
    """
    from torch.utils.benchmark import Timer  # its import warns of a missing GPU beside a torch with CUDA

    for length in lengths:
        calls = _calls(length, backends, heads, head_size, device, dtype)
        for what, statement in PASSES.items():
            medians = {}
            for name, call in calls.items():
                timer = Timer(statement, globals={"torch": torch, "call": call}, num_threads=torch.get_num_threads())
                medians[name] = timer.blocked_autorange(min_run_time=seconds).median
            yield Times(length, what, medians)


def _calls(
    length: int,
    backends: Sequence[str | None],
    heads: int,
    head_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Callable[[], Tensor]]:
    def randn(heads: int) -> Tensor:
        return torch.randn(1, heads, length, head_size, device=device, dtype=dtype, requires_grad=True)

    query, key, value = randn(heads), randn(heads // 4), randn(heads // 4)
    bias = torch.zeros(1, heads, length, 2, device=device)
    sink = torch.zeros(1, heads, length, device=device)
    modality = (torch.arange(length, device=device) % max(length // 2, 1) < length // 4).int()[None]

    def ours(backend: str | None) -> Tensor:
        options: dict[str, Any] = {"is_causal": True, "return_lse": True, "return_mass": True}
        with use_backend(backend):
            return modular_attention(query, key, value, modality, modality_bias=bias, sink=sink, **options)[0]

    def theirs() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return {backend or "": functools.partial(ours, backend) for backend in backends} | {SDPA: theirs}
