"""The project's goals, on CPUs (float32, 2 threads) and on an H200 (bfloat16), and what a run says about them.

What can be reached depends on the instructions of a machine. With AMX, float32 is computed by tiles, and the goal is a
ratio to torch's attention. Without, every library's limit is the rate of multiply-adds, and the goal is a share of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .timing import ratio

MEMORY_LENGTH = 16384
MEMORY_LIMIT_MB = 64.0
GROWTH_LIMIT = 1.10
_LENGTHS = [2048, 4096, 8192, 16384, 32768]
GROWTH_LENGTHS = {
    "attention": {"forward": _LENGTHS, "train": _LENGTHS[:3]},
    "aligner": {"forward": _LENGTHS, "train": _LENGTHS},  # its FLOPs grow linearly with the length
}


@dataclass(frozen=True)
class Goal:
    """``numerator / peer`` must not exceed ``limit`` on any case whose label holds every word of ``where``.

    With ``share`` the numerator's useful FLOP/s must be at least ``limit`` of the peer's.
    """

    peer: str
    limit: float
    where: str = "small-cpu"
    mode: str = "forward"
    numerator: str = "ours"
    share: bool = False

    def applies(self, row: dict) -> bool:
        return row["mode"] == self.mode and set(self.where.split()) <= set(row["case"].split())

    def __str__(self) -> str:
        where = self.where or "every case"
        return f"{self.mode}, {where}: {self.numerator} / {self.peer}" + ", FLOP/s" * self.share


CPU_GOALS = [
    Goal("sdpa-mask", 0.35),
    Goal("merge", 0.60),
    Goal("ours-plain", 1.03),
    Goal("ours-plain", 1.03, mode="train"),
    Goal("sdpa", 1.00, "decode"),
    # The projection and the views, also with the indicator that a conditional mask asks for: alone, and what they add
    # to attention given the views where both are one operator.
    Goal("attention", 0.15, "aligned", numerator="aligner-plain"),
    Goal("attention", 0.15, "aligned", "train", "aligner-plain"),
    Goal("attention", 0.15, "aligned", numerator="aligner"),
    Goal("attention", 0.18, "aligned", "train", "aligner"),
    Goal("attention", 1.15, "aligned", numerator="ours-plain"),
    Goal("attention", 1.15, "aligned"),
    # The release aligns keys: the aligner as it is used in a causal model, and its form that aligns keys too.
    Goal("release-loop", 0.20, "aligner-batch B=8", numerator="aligner"),
    Goal("release-loop", 0.20, "aligner-batch B=8", numerator="align-keys"),
    Goal("mm", 0.60, "gram", share=True),
    Goal("sdpa-gathered", 1.00, "paged decode", numerator="paged"),
    Goal("sdpa-gathered", 1.60, "paged decode", numerator="paged-duplex"),
    Goal("contiguous", 1.15, "paged chunk", numerator="paged-duplex"),
]
OF_TILES = [
    Goal("sdpa", 0.60, "small-cpu N=1024 D=128"),
    Goal("sdpa", 0.55, "small-cpu N=1024 D=64"),
    Goal("sdpa", 0.65, "small-cpu N=2048 D=128"),
    Goal("sdpa", 0.62, "small-cpu N=2048 D=64"),
    Goal("sdpa", 0.60, "small-cpu N=1024", mode="train"),
    Goal("sdpa", 0.72, "small-cpu N=2048", mode="train"),
    # The dense mask and the merge in forms that are tuned or do less. With any of these three, multiply-adds are at a
    # third to a half of their rate, so that without tiles nobody could keep the limit.
    Goal("flex", 0.30),
    Goal("sdpa-mask-given", 0.35),
    Goal("merge-runs", 0.60),
]
OF_MULTIPLY_ADDS = [Goal("peak", 0.85, "small-cpu N=2048 D=128", share=True)]  # the longest: the rest is per call
BF16_AS_FAST = Goal("ours", 1.10, numerator="ours-bf16")  # converted and computed as float32
BF16_IN_PAIRS = Goal("ours", 0.62, numerator="ours-bf16")  # two products for each multiply-add

# Beside CPU_GOALS, by the instruction set that moda_ext.info() names. Others have no goals of their own.
GOALS_OF_ISA = {
    "amx": [*OF_TILES, BF16_AS_FAST],
    "avx512_bf16": [*OF_MULTIPLY_ADDS, BF16_IN_PAIRS],
    "avx512": [*OF_MULTIPLY_ADDS, BF16_AS_FAST],
    "avx2": [*OF_MULTIPLY_ADDS, BF16_AS_FAST],
}


def cpu_goals(isa: str | None) -> list[Goal]:
    return [*GOALS_OF_ISA.get(isa or "", []), *CPU_GOALS]


CUDA_GOALS = [
    Goal("cudnn", 1.05, "llava-next"),
    Goal("cudnn", 1.05, "causal"),
    Goal("cudnn", 1.10, "llava-next", "train"),
    Goal("cudnn", 1.10, "causal", "train"),
    Goal("flex", 0.60, ""),
    Goal("sdpa-mask", 0.25, ""),
    Goal("merge", 0.60, ""),
    Goal("merge-runs", 0.60, ""),
    Goal("ours-plain", 1.03, ""),
    Goal("ours-plain", 1.03, "", "train"),
    Goal("cudnn", 1.10, "decode"),
    Goal("attention", 0.15, "aligned", numerator="aligner"),
    Goal("release-loop", 0.05, "aligner-batch B=8", numerator="aligner"),
    Goal("release-loop", 0.05, "aligner-batch B=8", numerator="align-keys"),
]


def judge(
    results: list[dict],
    memory: dict[str, float | None],
    growth: dict[str, dict[int, float]],
    goals: list[Goal],
) -> list[dict]:
    """One entry per goal: text, limit, figures, met (None when the run holds no figure for it)."""
    verdicts = []
    for goal in goals:
        cases: dict[str, dict[str, dict]] = {}
        for row in filter(goal.applies, results):
            if row["samples"]:
                cases.setdefault(row["case"], {})[row["contender"]] = row
        figures = {}
        for case, rows in cases.items():
            if goal.numerator in rows and goal.peer in rows:
                over, under = rows[goal.numerator], rows[goal.peer]
                figures[case] = rate_share(over, under) if goal.share else ratio(over["samples"], under["samples"])
        verdicts.append(verdict(str(goal), goal.limit, figures, at_least=goal.share))
    figures = {f"N={MEMORY_LENGTH} {mode}": megabytes for mode, megabytes in memory.items() if megabytes is not None}
    verdicts.append(verdict("peak memory beyond inputs and outputs, MB", MEMORY_LIMIT_MB, figures))
    for title, times in growth.items():
        figures = {f"N={n}": value for n, value in times.items()}
        verdicts.append(verdict(f"{title}: time per useful FLOP, against N=2048", GROWTH_LIMIT, figures))
    return verdicts


def rate_share(row: dict, peer: dict) -> float:
    """Useful FLOP/s of a row over those of another."""
    return row["gflop"] / peer["gflop"] * ratio(peer["samples"], row["samples"])


def verdict(text: str, limit: float, figures: dict[str, float], at_least: bool = False) -> dict:
    met = None
    if figures:
        met = min(figures.values()) >= limit if at_least else max(figures.values()) <= limit
    return {"goal": text, "limit": limit, "at_least": at_least, "figures": figures, "met": met}


def print_goals(verdicts: list[dict]) -> None:
    """With the number of those that a run of some workloads only says nothing about."""
    print("\ngoals")
    for v in (v for v in verdicts if v["figures"]):
        word, sign = "met" if v["met"] else "MISSED", ">=" if v["at_least"] else "<="
        figures = ", ".join(f"{case.removeprefix('small-cpu ')}: {value:.2f}" for case, value in v["figures"].items())
        print(f"  {word:6} {sign} {v['limit']:<5.3g} {v['goal']}: {figures}")
    print(f"  no figure for {sum(v['met'] is None for v in verdicts)} of {len(verdicts)}")
