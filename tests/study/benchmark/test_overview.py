"""The overview: means over settings of one kind alone, verdicts counted."""

from __future__ import annotations

import math

import pytest

from fusion.study.benchmark.answers import answers
from fusion.study.benchmark.comparison import overview
from fusion.study.benchmark.markdown import markdown
from fusion.study.benchmark.statistics import VERDICTS

from .conftest import TASKS, Sweep, small_benchmark

EXPERTS = dict(zip(TASKS, (0.95, 0.85), strict=True))


def score(first_task: float) -> float:
    """The score of a network whose second task is 0.1 below the first."""
    shares = (first_task / EXPERTS[TASKS[0]], (first_task - 0.1) / EXPERTS[TASKS[1]])
    return 100 * sum(shares) / 2


def test_a_mean_is_over_the_settings_of_one_kind_and_all_of_them(sweep: Sweep) -> None:
    gains = {"one": 0.1, "two": 0.02, "apart": 0.05}
    for setting, gain in gains.items():
        for seed in range(3):
            base = {} if setting == "apart" else {"base": 0.5}
            sweep.controls(seed, base, setting=setting)
            sweep.methods("simple_average", seed, {"merged": 0.6}, setting=setting)
            sweep.methods("regmean", seed, {"merged": 0.6 + gain}, setting=setting)
            if setting == "one":
                sweep.methods("wudi", seed, {"merged": 0.5}, setting=setting)
    table = overview(sweep.measured())
    expected = (score(0.7) + score(0.62)) / 2
    assert table.loc["regmean", "score"] == pytest.approx(expected)
    assert table.loc["regmean", "gain"] == pytest.approx(expected - score(0.6))
    assert table.loc["regmean", "gain_apart"] == pytest.approx(score(0.65) - score(0.6))
    assert math.isnan(table.loc["wudi", "gain"])  # of one setting of two: no number to compare
    assert math.isnan(table.loc["simple_average", "gain"])


def test_verdicts_are_counted_and_stand_in_the_table(sweep: Sweep) -> None:
    measured = small_benchmark(sweep, settings=("a", "b"), seeds=5).measured()
    table = overview(measured)
    assert table.loc["regmean", list(VERDICTS)].tolist() == [2, 0, 0, 0]
    assert table.loc["slerp", list(VERDICTS)].tolist() == [0, 2, 0, 0]
    text = markdown(measured, answers(measured), command="fusion_bench experiment=mine")
    assert text.index("`fusion_bench experiment=mine`") < text.index("| method | needs | score |")
    row = next(line for line in text.splitlines() if line.startswith("| regmean |"))
    assert row.endswith("| – | 2 | 0 | 0 | 0 |")
