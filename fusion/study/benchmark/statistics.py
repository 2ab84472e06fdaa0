"""Paired comparisons over seeds and ranks over settings; scipy and statsmodels do the arithmetic.

The unit is the seed: one pool trained anew, on which all methods are measured. Two errors are kept
apart. The *seed error* is that of training the pool again and is what the tests below speak of. The
*test error* is that of having these test images and no others; it does not shrink with more seeds,
because every seed is measured on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

MARGIN = 0.5  # points: a difference that nobody needs to care about
LEVEL = 0.05  # of every test
BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"
VERDICTS = (BETTER, EQUIVALENT, WORSE, UNDECIDED)  # in the order of tables


@dataclass(frozen=True)
class Difference:
    """A paired difference over seeds.

    Attributes:
        pairs: how many seeds measured both.
        mean: of the differences.
        error: standard error of the mean between seeds; missing below two pairs.
        p: of Student's paired t-test, two-sided; missing where it has no meaning.
        p_equivalence: of the two one-sided tests; missing where it has no meaning.
    """

    pairs: int
    mean: float
    error: float
    p: float
    p_equivalence: float


def paired_difference(
    values: Sequence[float], reference: Sequence[float], *, margin: float = MARGIN
) -> Difference:
    r"""Compare two sequences of the same seeds.

    With the differences :math:`d_1 \dots d_n`, their mean :math:`\bar d` and their standard
    deviation :math:`s`,

    .. math:: t = \bar d \sqrt n / s, \qquad t_\pm = (\bar d \pm m) \sqrt n / s

    with n − 1 degrees of freedom. ``p`` is two-sided for :math:`t`; ``p_equivalence`` is the larger
    of the one-sided p values of :math:`t_+ > 0` and :math:`t_- < 0` (Schuirmann, 1987, "A
    comparison of the two one-sided tests procedure"). Sequences that are equal in every seed do not
    differ (p = 1) and are equivalent (p = 0). Equal differences other than zero say nothing about
    the spread between seeds: both p values are missing.

    Args:
        values: one number per seed; pairs with a missing number are left out.
        reference: of the same seeds in the same order.
        margin: m, in the unit of the numbers.
    """
    first = np.asarray(values, dtype=float)
    second = np.asarray(reference, dtype=float)
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    differences = first - second
    n = len(differences)
    if n < 2:
        mean = float(differences.mean()) if n else math.nan
        return Difference(n, mean, math.nan, math.nan, math.nan)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    if not differences.any():
        return Difference(n, 0.0, 0.0, 1.0, 0.0)
    if np.ptp(differences) < 1e-9 * abs(mean):
        return Difference(n, mean, 0.0, math.nan, math.nan)
    return Difference(
        n,
        mean,
        error,
        p=float(stats.ttest_rel(first, second).pvalue),
        p_equivalence=float(ttost_paired(first, second, -margin, margin)[0]),
    )


def standard_error(values: Sequence[float] | pd.Series[float]) -> float:
    """Return the standard error of the mean; missing below two values."""
    numbers = np.asarray(values, dtype=float)
    return float(stats.sem(numbers)) if len(numbers) > 1 else math.nan


def holm(p: Sequence[float]) -> NDArray[np.float64]:
    r"""Return p values that keep the rate of any false finding in a family (Holm, 1979).

    With the n known values in ascending order, the k-th becomes
    :math:`\min(1, \max_{j \le k} (n - j + 1)\, p_j)`. Missing ones stay missing and do not count.
    """
    # Not statsmodels' `multipletests`: it collects the garbage of the process at every call,
    # which takes minutes over all settings. The tests hold this against it.
    values = np.asarray(p, dtype=float)
    corrected = np.full_like(values, math.nan)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # missing ones sort last
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1.0)
    return corrected


def verdict(
    mean: float, p: float, p_equivalence: float, *, margin: float = MARGIN, level: float = LEVEL
) -> str:
    """Return ``equivalent``, ``better``, ``worse`` or ``undecided``.

    Equivalent comes first: a difference that is proven smaller than the margin is not reported as a
    gain, however surely it is not zero.

    Args:
        mean: of the differences.
        p: that they are zero, after correction.
        p_equivalence: that they are not within the margin, after correction.
        margin: of the equivalence test.
        level: of both tests.
    """
    if p_equivalence < level and abs(mean) < margin:
        return EQUIVALENT
    if p < level:
        return BETTER if mean > 0 else WORSE
    return UNDECIDED


def binomial_error(accuracy: float, images: float) -> float:
    r"""Return the standard error of an accuracy on n images: :math:`\sqrt{a (1 - a) / n}`."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images)


def paired_error_bounds(first: float, second: float, images: float) -> tuple[float, float]:
    r"""Return the least and the largest standard error of the difference of two accuracies.

    On the same n images, with q the share of images that exactly one of the two answers rightly,

    .. math:: \sigma^2 = \left(q - (a_1 - a_2)^2\right) / n

    (McNemar, 1947). Reports hold accuracies and not q, which lies between
    :math:`|a_1 - a_2|` and :math:`\min(a_1 + a_2, 2 - a_1 - a_2)`.
    """
    difference = first - second
    least = abs(difference) - difference**2
    largest = min(first + second, 2 - first - second) - difference**2
    return math.sqrt(max(least, 0.0) / images), math.sqrt(max(largest, 0.0) / images)


def score_error_bounds(
    first: Mapping[str, float],
    second: Mapping[str, float],
    expert: Mapping[str, float],
    images: Mapping[str, float],
) -> tuple[float, float]:
    r"""Return bounds of the test error of a difference of scores, in points.

    A score is :math:`\frac{100}{T} \sum_t a_t / e_t`, with the expert's accuracy :math:`e_t` as a
    constant. The least is that of the tasks' least errors if the tasks have images of their own
    (variances add), the largest that of the largest errors if they share their images (errors add).

    Args:
        first: task → accuracy.
        second: task → accuracy of the reference.
        expert: task → accuracy of its expert.
        images: task → number of test images.
    """
    tasks = [task for task in first if task in second and images.get(task)]
    if not tasks:
        return math.nan, math.nan
    bounds = {t: paired_error_bounds(first[t], second[t], images[t]) for t in tasks}
    least = math.sqrt(math.fsum((bounds[t][0] / expert[t]) ** 2 for t in tasks))
    largest = math.fsum(bounds[t][1] / expert[t] for t in tasks)
    return 100 * least / len(tasks), 100 * largest / len(tasks)


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of k methods over N settings, and whether they differ.

    Attributes:
        mean: method → mean rank, 1 is best; sorted.
        settings: N.
        p_friedman: of Friedman's test, that all methods rank the same.
        critical_difference: of Nemenyi's test: mean ranks that differ by less are not shown to
            differ.
    """

    mean: pd.Series[float]
    settings: int
    p_friedman: float
    critical_difference: float

    def cliques(self) -> list[tuple[str, ...]]:
        """Return the largest groups of neighbours that differ by less than the critical one."""
        names, means = list(self.mean.index), self.mean.to_numpy()
        found: list[tuple[str, ...]] = []
        reached = 0
        for i in range(len(names)):
            j = int(np.searchsorted(means, means[i] + self.critical_difference, side="left"))
            if j - i > 1 and j > reached:
                found.append(tuple(names[i:j]))
                reached = j
        return found


def mean_ranks(scores: pd.DataFrame, *, level: float = LEVEL) -> Ranks:
    r"""Rank methods in every setting and compare their mean ranks (Demšar, 2006, section 3.2).

    Ties share their mean rank. Friedman's :math:`\chi^2_F` is scipy's. The critical difference is

    .. math:: CD = q_\alpha \sqrt{k (k + 1) / (6 N)}

    where :math:`q_\alpha` is the quantile of the studentised range of k means with infinitely many
    degrees of freedom, divided by :math:`\sqrt 2`.

    Args:
        scores: settings × methods, no number missing; higher is better.
        level: α.

    Raises:
        ValueError: fewer than two settings or two methods, or a number is missing.
    """
    settings, k = scores.shape
    if settings < 2 or k < 2 or scores.isna().any(axis=None):
        raise ValueError(
            f"mean ranks need two settings and two methods without gaps, got {settings} x {k}"
        )
    ranks = scores.rank(axis=1, ascending=False)
    q = float(stats.studentized_range.ppf(1 - level, k, np.inf)) / math.sqrt(2)
    if k > 2:  # for two methods scipy has no Friedman test, and a sign test is what it would be
        p = float(stats.friedmanchisquare(*(scores[name] for name in scores)).pvalue)
    else:
        wins = int((ranks.iloc[:, 0] < ranks.iloc[:, 1]).sum())
        losses = int((ranks.iloc[:, 0] > ranks.iloc[:, 1]).sum())
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Ranks(
        ranks.mean().sort_values(kind="stable"),
        settings,
        p,
        q * math.sqrt(k * (k + 1) / 6 / settings),
    )
