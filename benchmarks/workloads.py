"""The shapes that are measured, their inputs and the work they hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from moda_ext.alignment import duplex_query_views
from moda_ext.attention import ModularDuplexAttention

TEXT, VISION = 0, 1


@dataclass(frozen=True)
class Case:
    """One call. ``runs`` is the token layout: (modality, number of tokens), in order.

    ``kind`` says of what: "attention", "aligned" (attention through an aligner), "aligner" (alone), "gram", "module"
    (a whole layer) or "paged" (a step of serving).
    """

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
    kind: str = "attention"
    rank: int = 16  # of the aligner
    embedding: int = 4096  # of a whole layer
    device: str = "cpu"

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
        """Of attention. Two products forward; backward adds five (one of them recomputes the scores)."""
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


def _paged() -> list[Case]:
    def case(label: str, keys: int, rows: int) -> Case:
        return Case("paged", f"paged {label}", image_in_text(64, 2880, keys - 2944), num_queries=rows, kind="paged")

    return [
        case("decode 4k keys", 4096, 1),
        case("decode 32k keys", 32768, 1),
        case("chunk of 512, 16k keys", 16384, 512),
    ]


LLAVA_15 = Case("llava-1.5", "llava-1.5 N=675", image_in_text(35, 576, 64))
LLAVA_NEXT = Case("llava-next", "llava-next N=3072", image_in_text(32, 2880, 160))
VIDEO = Case("video", "video N=16576", image_in_text(64, 16384, 128))


def _as(workload: str, case: Case, **changes) -> Case:
    return replace(case, workload=workload, label=f"{workload} {case.label}", **changes)


WORKLOADS = {
    "small-cpu": _small_cpu(),
    # The same shape with a tenth of the bias entries at -inf.
    "hidden": [replace(_small_cpu()[1], workload="hidden", label="hidden N=1024 D=128", hidden=True)],
    "llava-1.5": [LLAVA_15],
    "llava-next": [LLAVA_NEXT],
    "interleaved": [Case("interleaved", "interleaved N=2560", ((VISION, 256), (TEXT, 64)) * 8)],
    "video": [VIDEO],
    "decode": _decode(),
    "aligned": [_as("aligned", LLAVA_NEXT, kind="aligned")],
    "aligner-batch": [_as("aligner-batch", replace(LLAVA_15, label="llava-1.5 N=675 B=8"), batch=8, kind="aligner")],
    "gram": [_as("gram", case, kind="gram") for case in (LLAVA_NEXT, VIDEO)],
    "paged": _paged(),
    "module": [_as("module", LLAVA_15, kind="module")],
}


def growth_case(n: int, kind: str = "attention") -> Case:
    """A small-cpu shape of ``n`` tokens: for time and memory against length."""
    runs = image_in_text(32, n // 2, n - n // 2 - 32)
    return Case("growth", f"growth N={n}", runs, query_heads=8, key_heads=2, kind=kind)


@dataclass
class Inputs:
    """What one call reads. query, key, value lie (B, N, H, D) in memory, as projections give them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_modality: torch.Tensor  # (B, Nk) int32
    bias: torch.Tensor  # (B, Hq, Nq, M), float32 (float64 for float64 inputs)
    sink: torch.Tensor  # (B, Hq, Nq)
    grad: dict[str, torch.Tensor]  # incoming gradients of the outputs, by name
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # what only some kinds of case have

    def leaves(self, names: tuple[str, ...]) -> list[torch.Tensor]:
        """The tensors of these names, which a gradient is taken for."""
        return [self.extra[name] if name in self.extra else getattr(self, name) for name in names]

    def require_grad(self, on: bool) -> None:
        for tensor in self.leaves(("query", "key", "value", "bias", "sink", *self.extra)):
            tensor.requires_grad_(on)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of a case, the same for every contender."""
    generator = torch.Generator(case.device).manual_seed(seed)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=acc):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=case.device).to(dtype)

    def heads(tokens, number):
        return normal(case.batch, tokens, number, case.head_dim, dtype=case.dtype).transpose(1, 2)

    modality = torch.cat([torch.full((length,), m, dtype=torch.int32) for m, length in case.runs])
    rows = (case.batch, case.query_heads, case.rows)
    bias = normal(*rows, case.num_modalities)
    if case.hidden:
        bias[torch.rand(bias.shape, generator=generator, device=case.device) < 0.1] = -torch.inf
    inputs = Inputs(
        query=heads(case.rows, case.query_heads),
        key=heads(case.num_keys, case.key_heads),
        value=heads(case.num_keys, case.key_heads),
        key_modality=modality.expand(case.batch, -1).to(case.device).contiguous(),
        bias=bias,
        sink=normal(*rows),
        grad={
            "out": heads(case.rows, case.query_heads),
            "lse": normal(*rows),
            "mass": normal(*rows, case.num_modalities),
        },
    )
    per_modality = (case.num_modalities, *rows)
    if case.kind in ("aligned", "aligner", "paged"):
        weights = {"a1": (case.head_dim, case.rank), "b1": (case.rank, case.head_dim)}
        weights |= {"a2": weights["a1"], "b2": weights["b1"]}
        inputs.extra = {n: normal(case.num_modalities, *s) * case.head_dim**-0.5 for n, s in weights.items()}
        inputs.grad["views"] = normal(*per_modality, case.head_dim, dtype=case.dtype)
        inputs.grad["indicator"] = normal(*rows, case.num_modalities)
    if case.kind == "aligned":
        tokens = (inputs.query, inputs.key, inputs.key_modality, inputs.key_modality)
        inputs.extra["views"] = duplex_query_views(*tokens, *inputs.extra.values(), case.num_modalities)
    elif case.kind == "aligner":
        inputs.extra |= {"ratio_v": normal(1, 1, case.head_dim), "pfuser_v.weight": normal(*[case.head_dim] * 2)}
        inputs.grad["keys"] = heads(case.num_keys, case.key_heads)
    elif case.kind == "gram":
        inputs.extra = {"left": normal(*PRODUCT), "right": normal(*PRODUCT)}
        inputs.grad["product"] = normal(*PRODUCT)
        inputs.grad["gram"] = normal(case.batch, case.key_heads, case.num_modalities, *[case.head_dim] * 2)
    elif case.kind == "module":
        shapes = {name: weight.shape for name, weight in make_layer(case).named_parameters()}
        inputs.extra = {"x": normal(case.batch, case.rows, case.embedding, dtype=case.dtype)}
        inputs.extra |= {n: normal(*s, dtype=case.dtype) * s[-1] ** -0.5 for n, s in shapes.items()}
        inputs.grad["hidden"] = normal(case.batch, case.rows, case.embedding, dtype=case.dtype)
    return inputs


PRODUCT = (2048, 2048)  # the matrices that show the machine's rate


def make_layer(case: Case, cls: type = ModularDuplexAttention, **options) -> ModularDuplexAttention:
    """The layer of a case. Its calls take their weights from the inputs."""
    sizes = (case.embedding, case.query_heads, case.key_heads, case.num_modalities)
    return cls(*sizes, head_dim=case.head_dim, **options).to(case.device, case.dtype)
