"""Intervals and tests, against published values, enumeration and simulation."""

import math
import random

import pytest

pytest.importorskip("scipy", reason="scipy is not installed")

from moda_ext.evaluation.statistics import (  # noqa: E402
    Proportion,
    f1_scores,
    holm,
    paired_difference,
    seeds_difference,
)


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(count, n, low, high):
    assert Proportion(count, n).interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("count", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_a_proportion_is_one(count, n):
    with pytest.raises(ValueError, match="0 <= count <= n"):
        Proportion(count, n)


def outcomes(both, lost, gained, neither):
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return before, after


@pytest.mark.parametrize(("lost", "gained"), [(1, 9), (0, 5), (7, 7), (0, 0), (12, 3)])
def test_mcnemar_is_the_sum_of_the_binomial(lost, gained):
    found = paired_difference(*outcomes(10, lost, gained, 6))
    total = lost + gained
    tail = sum(math.comb(total, i) for i in range(min(lost, gained) + 1)) / 2**total
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert (found.lost, found.gained, found.n) == (lost, gained, 16 + total)
    assert found.difference == pytest.approx((gained - lost) / found.n)


def test_the_interval_of_a_paired_difference_by_hand():
    """n = 98, 9 gained and 1 lost: g = .1, l = .02, so .08 -+ 1.95996 sqrt((.12 - .0064) / 100)."""
    low, high = paired_difference(*outcomes(60, 1, 9, 28)).interval
    assert (low, high) == pytest.approx((0.08 - 1.959964 * 0.0337046, 0.08 + 1.959964 * 0.0337046), abs=1e-6)


def test_the_interval_of_a_paired_difference_covers():
    """In 95 % of samples of a known difference: .25 - .15 = .1, 60 questions."""
    rng, covered = random.Random(0), 0
    for _ in range(2000):
        draws = [rng.random() for _ in range(60)]
        before = [u < 0.40 for u in draws]  # 25 % both, 15 % the first alone, 25 % the second alone
        after = [u < 0.25 or 0.40 <= u < 0.65 for u in draws]
        low, high = paired_difference(before, after).interval
        covered += low <= 0.1 <= high
    assert 0.935 <= covered / 2000 <= 0.97


def test_equal_models_do_not_differ():
    found = paired_difference([True, False] * 20, [True, False] * 20)
    assert (found.difference, found.p) == (0, 1)
    assert found.interval[0] < 0 < found.interval[1]


def test_pairs_must_go_together():
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([True, False], [True])


def test_seeds_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.302653."""
    found = seeds_difference([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found.mean == 2
    assert found.interval == pytest.approx((2 - half, 2 + half), abs=1e-5)
    ratio = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - ratio / math.sqrt(2 + ratio**2))  # t of 2 degrees of freedom in closed form


def test_seeds_without_spread():
    assert seeds_difference([0.0, 0.0]).p == 1
    assert seeds_difference([0.25, 0.25]).p == 0
    with pytest.raises(ValueError, match="two pairs or more"):
        seeds_difference([0.1])


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_holm_keeps_the_error_of_the_family():
    """Of 2,000 families of 8 true null hypotheses, about 5 % have a rejected one."""
    rng = random.Random(1)
    rejected = sum(min(holm([rng.random() for _ in range(8)])) < 0.05 for _ in range(2000))
    assert 0.035 <= rejected / 2000 <= 0.065


def test_f1():
    expected = ["a", "a", "a", "b", "b", "c"]
    given = ["a", "a", "b", "b", None, "a"]
    assert f1_scores(expected, given, "abcd") == pytest.approx({"a": 4 / 6, "b": 2 / 4, "c": 0, "d": 0})
