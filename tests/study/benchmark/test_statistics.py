"""Tests and ranks against numbers worked by hand, published ones, and their nominal rates."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from fusion.study.benchmark.statistics import (
    binomial_error,
    holm,
    mean_ranks,
    paired_difference,
    paired_error_bounds,
    score_error_bounds,
    verdict,
)


def test_a_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1/√3, t = 2√3.
    found = paired_difference([11.0, 12.0, 13.0], [10.0, 10.0, 10.0])
    assert (found.pairs, found.mean) == (3, 2.0)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    t = 2 * math.sqrt(3)
    # Student's t with two degrees of freedom has a closed form: P(T > t) = (1 − t/√(t² + 2)) / 2.
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    upper = (2 - 0.5) * math.sqrt(3)
    assert found.p_equivalence == pytest.approx((1 + upper / math.sqrt(upper**2 + 2)) / 2)


def test_only_what_the_seed_shares_is_paired_away() -> None:
    rng = np.random.default_rng(0)
    levels = 90 + 5 * rng.standard_normal(5)
    found = paired_difference(levels + 1 + 0.1 * rng.standard_normal(5), levels)
    assert found.error < 0.1 < stats.sem(levels)
    assert found.p < 0.001


def test_a_missing_number_leaves_its_pair_out() -> None:
    found = paired_difference([1.0, math.nan, 3.0], [0.0, 0.0, 0.0])
    assert (found.pairs, found.mean) == (2, 2.0)
    assert paired_difference([math.nan], [1.0]).pairs == 0


def test_without_spread_nothing_is_claimed_of_the_spread() -> None:
    one = paired_difference([2.0], [1.0])
    assert (one.pairs, one.mean) == (1, 1.0)
    assert math.isnan(one.p)
    assert math.isnan(one.error)
    steady = paired_difference([2.0, 3.0], [1.0, 2.0])
    assert math.isnan(steady.p)
    assert math.isnan(steady.p_equivalence)
    equal = paired_difference([2.0, 3.0], [2.0, 3.0])
    assert (equal.p, equal.p_equivalence) == (1.0, 0.0)


def test_holm_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(0).random(20) ** 4
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-15)


def test_holm_by_hand_and_missing_ones_do_not_count() -> None:
    # Sorted 0.01, 0.02, 0.04 → 3·0.01, 2·0.02, 1·0.04, each at least the one before.
    assert holm([0.04, 0.01, math.nan, 0.02])[[0, 1, 3]] == pytest.approx([0.04, 0.03, 0.04])
    assert math.isnan(holm([0.04, math.nan])[1])
    assert holm([0.04, math.nan])[0] == 0.04


@pytest.mark.parametrize(
    ("mean", "p", "p_equivalence", "expected"),
    [
        (2.0, 0.01, 0.9, "better"),
        (-2.0, 0.01, 0.9, "worse"),
        (0.2, 0.01, 0.01, "equivalent"),  # surely not zero, surely too small to matter
        (0.2, 0.5, 0.2, "undecided"),  # no proof of a difference is no proof of none
        (0.2, math.nan, math.nan, "undecided"),
    ],
)
def test_verdicts(mean: float, p: float, p_equivalence: float, expected: str) -> None:
    assert verdict(mean, p, p_equivalence) == expected


def _verdicts(effect: float, *, seeds: int, spread: float, trials: int = 400) -> list[str]:
    rng = np.random.default_rng(7)
    found = []
    for _ in range(trials):
        differences = effect + spread * rng.standard_normal(seeds)
        one = paired_difference(differences, np.zeros(seeds))
        found.append(verdict(one.mean, one.p, one.p_equivalence))
    return found


def test_a_planted_effect_is_found_and_no_effect_at_the_nominal_rate() -> None:
    found = _verdicts(2.0, seeds=5, spread=0.5)
    assert found.count("better") > 0.95 * len(found)
    # 5 % of 400: between 2.5 and 8 % but in one of a thousand seeds.
    null = _verdicts(0.0, seeds=5, spread=2.0)
    wrong = null.count("better") + null.count("worse")
    assert 0.025 <= wrong / len(null) <= 0.08


def test_equivalence_is_found_when_it_holds_and_at_its_rate_on_the_margin() -> None:
    found = _verdicts(0.0, seeds=5, spread=0.2)
    assert found.count("equivalent") > 0.95 * len(found)
    at_the_margin = _verdicts(0.5, seeds=5, spread=0.2)
    assert 0.025 <= at_the_margin.count("equivalent") / len(at_the_margin) <= 0.08
    # Five seeds of large spread cannot show equivalence: silence is no agreement.
    assert _verdicts(0.0, seeds=5, spread=2.0).count("equivalent") < 4


def test_errors_of_the_test_images() -> None:
    assert binomial_error(0.5, 100) == pytest.approx(0.05)
    least, largest = paired_error_bounds(0.9, 0.8, 100)
    # Least: 10 of 100 images change, all one way: √((0.1 − 0.01)/100). Largest: 30 change.
    assert (least, largest) == pytest.approx((0.03, math.sqrt(0.29) / 10))
    assert paired_error_bounds(0.9, 0.9, 100)[0] == 0


def test_the_paired_error_of_real_answers_lies_within_its_bounds() -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(2000)
    first, second = (hard + 0.2 * rng.random(2000) < level for level in (0.9, 0.85))
    error = float(stats.sem(first.astype(float) - second))
    least, largest = paired_error_bounds(first.mean(), second.mean(), 2000)
    assert least < error < largest


def test_the_test_error_of_a_score() -> None:
    tasks = {"a": 0.9, "b": 0.9}
    other = {"a": 0.8, "b": 0.8}
    found = score_error_bounds(tasks, other, {"a": 1.0, "b": 1.0}, {"a": 100.0, "b": 100.0})
    # Two tasks of their own images halve the variance; on shared images nothing is gained.
    assert found == pytest.approx((100 * 0.03 / math.sqrt(2), 100 * math.sqrt(0.29) / 10))
    assert math.isnan(score_error_bounds({}, {}, {}, {})[0])


def test_ranks_by_hand() -> None:
    scores = pd.DataFrame({"a": [9, 8, 7, 9], "b": [8, 9, 6, 8], "c": [1, 2, 6, 3]}, dtype=float)
    found = mean_ranks(scores)
    # Ranks of a: 1, 2, 1, 1; of b: 2, 1, 2.5, 2; of c: 3, 3, 2.5, 3.
    assert found.mean.to_dict() == {"a": 1.25, "b": 1.875, "c": 2.875}
    assert list(found.mean.index) == ["a", "b", "c"]
    # χ² = 12 N / (k (k + 1)) · (Σ R² − k (k + 1)² / 4) = 5.375, divided by 1 − 6 / 96 for the tie.
    assert found.p_friedman == pytest.approx(stats.chi2.sf(5.375 / (1 - 6 / 96), 2))


@pytest.mark.parametrize(
    ("k", "settings", "critical"),
    # Demšar (2006): the example of section 3.2.4, and q = 1.960, 2.728, 3.164 of table 5a.
    [(4, 14, 1.25), (2, 6, 0.800), (5, 6, 2.490), (10, 6, 5.531)],
)
def test_critical_differences_are_the_papers(k: int, settings: int, critical: float) -> None:
    rng = np.random.default_rng(0)
    found = mean_ranks(pd.DataFrame(rng.random((settings, k))))
    assert found.critical_difference == pytest.approx(critical, abs=5e-3)


def test_cliques_are_the_largest_groups() -> None:
    scores = pd.DataFrame({name: [float(-i)] * 10 for i, name in enumerate("abcdef")})
    found = mean_ranks(scores)
    assert found.critical_difference == pytest.approx(2.384, abs=1e-3)
    assert found.cliques() == [tuple("abc"), tuple("bcd"), tuple("cde"), tuple("def")]
    assert found.p_friedman < 1e-6


def test_ranks_of_a_gap_are_refused() -> None:
    with pytest.raises(ValueError, match="without gaps"):
        mean_ranks(pd.DataFrame({"a": [1.0, math.nan], "b": [1.0, 2.0]}))
