"""Intervals and tests for answers that are right or wrong. All intervals are of 95 %. Needs scipy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

__all__ = ["PairedDifference", "Proportion", "SeedsDifference", "holm", "paired_difference", "seeds_difference"]

ALPHA = 0.05  # a difference whose p is not below it is "no significant difference"


@dataclasses.dataclass(frozen=True)
class Proportion:
    """``count`` of ``n``.

    Raises:
        ValueError: n below 1, or a count that is not within 0 and n.
    """

    count: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.count <= self.n:
            raise ValueError(f"Proportion: needs n >= 1 and 0 <= count <= n, got {self.count} of {self.n}")

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which holds for shares near 0 and 1 too."""
        from scipy.stats import binomtest

        found = binomtest(self.count, self.n).proportion_ci(1 - ALPHA, method="wilson")
        return float(found.low), float(found.high)


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Two models on the same questions.

    Attributes:
        n: questions.
        gained, lost: those that only the second model answers right, and only the first.
        p: of McNemar's exact test: whether gained and lost are equally likely, two-sided (Psychometrika 12, 1947).
    """

    n: int
    gained: int
    lost: int
    p: float

    @property
    def difference(self) -> float:
        """The second model's accuracy less the first's."""
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Bonett and Price's adjusted Wald interval (J. Educ. Behav. Stat. 37, 2012).

        With g = (gained + 1) / (n + 2) and l = (lost + 1) / (n + 2), it is
        g - l -+ z sqrt((g + l - (g - l)^2) / (n + 2)), cut to -1 and 1.
        """
        from scipy.stats import norm

        gained, lost = ((count + 1) / (self.n + 2) for count in (self.gained, self.lost))
        centre = gained - lost
        half = float(norm.ppf(1 - ALPHA / 2)) * math.sqrt((gained + lost - centre**2) / (self.n + 2))
        return max(-1.0, centre - half), min(1.0, centre + half)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> PairedDifference:
    """Compares two models by their answers.

    Args:
        before, after: whether each question is answered right, by the first and the second model.

    Raises:
        ValueError: no questions, or different numbers of them.
    """
    from scipy.stats import binomtest

    if not before or len(before) != len(after):
        raise ValueError(f"paired_difference: needs equally many outcomes, got {len(before)} and {len(after)}")
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return PairedDifference(len(before), gained, lost, p)


@dataclasses.dataclass(frozen=True)
class SeedsDifference:
    """Differences of several pairs of models, such as those of several seeds.

    Attributes:
        mean: of the pairs' differences.
        interval: of that mean, by Student's t over the pairs.
        p: of the t-test that the mean is 0, two-sided.
    """

    mean: float
    interval: tuple[float, float]
    p: float


def seeds_difference(differences: Sequence[float]) -> SeedsDifference:
    """The mean of several pairs' differences.

    Args:
        differences: one for each pair, two or more.

    Raises:
        ValueError: fewer than two.
    """
    from scipy.stats import t

    k = len(differences)
    if k < 2:
        raise ValueError(f"seeds_difference: needs two pairs or more, got {k}")
    mean = sum(differences) / k
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (k - 1) / k)
    if error == 0:  # no spread at all, as of models that answer alike
        return SeedsDifference(mean, (mean, mean), 0.0 if mean else 1.0)
    half = float(t.ppf(1 - ALPHA / 2, k - 1)) * error
    return SeedsDifference(mean, (mean - half, mean + half), float(2 * t.sf(abs(mean) / error, k - 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, Scand. J. Stat. 6, 1979), in the order given."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def f1_scores(expected: Sequence[str], given: Sequence[str | None], labels: Sequence[str]) -> dict[str, float]:
    """F1 of each label, 2 right / (expected + given), which is 0 for one that is neither.

    Args:
        expected: the right label of each question.
        given: the label that was answered, or None for an answer that is none of them.
        labels: all labels.
    """
    scores = {}
    for label in labels:
        right = sum(e == g == label for e, g in zip(expected, given, strict=True))
        total = sum(e == label for e in expected) + sum(g == label for g in given)
        scores[label] = 2 * right / total if total else 0.0
    return scores
