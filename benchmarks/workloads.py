"""The shapes that are measured, their inputs and the work they hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

TEXT, VISION = 0, 1


@dataclass(frozen=True)
class Case:
    """One attention call. ``runs`` is the token layout: (modality, number of tokens), in order."""

    workload: str
    label: str
    runs: tuple[tuple[int, int], ...]
    batch: int = 1
    query_heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    num_queries: int | None = None  # None: as many as keys. Fewer: the last rows (decoding)
    hidden: bool = False  # 10 % of the bias entries are -inf
    dtype: torch.dtype = torch.float32
    num_modalities: int = 2

    @property
    def num_keys(self) -> int:
        return sum(length for _, length in self.runs)

    @property
    def rows(self) -> int:
        return self.num_keys if self.num_queries is None else self.num_queries

    @property
    def visible_pairs(self) -> int:
        """Number of (row, key) pairs below the bottom-right aligned diagonal, for one head."""
        first = self.num_keys - self.rows + 1
        return self.rows * (first + self.num_keys) // 2

    def useful_flops(self, mode: str) -> int:
        """Two products forward; backward adds five (one of them is the recomputation of the scores)."""
        products = 2 if mode == "forward" else 7
        return products * 2 * self.batch * self.query_heads * self.head_dim * self.visible_pairs

    def score_bytes(self) -> int:
        """Size of one dense score matrix of this case."""
        return self.batch * self.query_heads * self.rows * self.num_keys * self.dtype.itemsize

    def key_value_bytes(self) -> int:
        return 2 * self.batch * self.key_heads * self.num_keys * self.head_dim * self.dtype.itemsize


def image_in_text(before: int, vision: int, after: int) -> tuple[tuple[int, int], ...]:
    return ((TEXT, before), (VISION, vision), (TEXT, after))


def _small_cpu() -> list[Case]:
    return [
        Case(
            "small-cpu",
            f"small-cpu N={n} D={d}",
            image_in_text(32, n // 2, n - n // 2 - 32),
            query_heads=8,
            key_heads=2,
            head_dim=d,
        )
        for n in (1024, 2048)
        for d in (64, 128)
    ]


def _decode() -> list[Case]:
    return [
        Case(
            "decode",
            f"decode {n // 1024}k keys B={b}",
            image_in_text(64, n - 192, 128),
            batch=b,
            num_queries=1,
        )
        for n in (4096, 32768)
        for b in (1, 16)
    ]


WORKLOADS = {
    "small-cpu": _small_cpu(),
    # The same shape with a tenth of the bias entries at -inf.
    "hidden": [replace(_small_cpu()[1], workload="hidden", label="hidden N=1024 D=128", hidden=True)],
    "llava-1.5": [Case("llava-1.5", "llava-1.5 N=675", image_in_text(35, 576, 64))],
    "llava-next": [Case("llava-next", "llava-next N=3072", image_in_text(32, 2880, 160))],
    "interleaved": [Case("interleaved", "interleaved N=2560", ((VISION, 256), (TEXT, 64)) * 8)],
    "video": [Case("video", "video N=16576", image_in_text(64, 16384, 128))],
    "decode": _decode(),
}


def growth_case(n: int) -> Case:
    """A small-cpu shape of ``n`` tokens: for time and memory against length."""
    return Case("growth", f"growth N={n}", image_in_text(32, n // 2, n - n // 2 - 32), query_heads=8, key_heads=2)


@dataclass
class Inputs:
    """What one call reads. query, key, value lie (B, N, H, D) in memory, as projections give them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_modality: torch.Tensor  # (B, Nk) int32
    bias: torch.Tensor  # (B, Hq, Nq, M), float32 (float64 for float64 inputs)
    sink: torch.Tensor  # (B, Hq, Nq)
    grad: dict[str, torch.Tensor]  # incoming gradients of out, lse, mass

    def leaves(self, with_terms: bool) -> list[torch.Tensor]:
        """The tensors a gradient is taken for; bias and sink where the contender has them."""
        tensors = [self.query, self.key, self.value]
        return tensors + [self.bias, self.sink] if with_terms else tensors

    def require_grad(self, on: bool) -> None:
        for tensor in self.leaves(with_terms=True):
            tensor.requires_grad_(on)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of a case, the same for every contender."""
    generator = torch.Generator().manual_seed(seed)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=acc):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    def heads(tokens, number):
        return normal(case.batch, tokens, number, case.head_dim, dtype=case.dtype).transpose(1, 2)

    modality = torch.cat([torch.full((length,), m, dtype=torch.int32) for m, length in case.runs])
    rows = (case.batch, case.query_heads, case.rows)
    bias = normal(*rows, case.num_modalities)
    if case.hidden:
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = -torch.inf
    return Inputs(
        query=heads(case.rows, case.query_heads),
        key=heads(case.num_keys, case.key_heads),
        value=heads(case.num_keys, case.key_heads),
        key_modality=modality.expand(case.batch, -1).contiguous(),
        bias=bias,
        sink=normal(*rows),
        grad={
            "out": heads(case.rows, case.query_heads),
            "lse": normal(*rows),
            "mass": normal(*rows, case.num_modalities),
        },
    )
