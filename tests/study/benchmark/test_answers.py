"""Planted effects are told, with their numbers; what was not measured is said not to be."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.study.benchmark.answers import NOT_MEASURED, answers
from fusion.study.benchmark.comparison import (
    against_task_arithmetic,
    at_its_best,
    compare,
    shared_block,
)

from .conftest import Sweep, small_benchmark


def told(sweep: Sweep) -> dict[str, str]:
    return {answer.name: " ".join(answer.sentences) for answer in answers(sweep.measured())}


def test_every_answer_tells_what_was_planted(sweep: Sweep) -> None:
    found = told(small_benchmark(sweep))
    assert "better: regmean (+" in found["H1"]
    assert "worse: ties_merging (−" in found["H1"]
    # Fisher's 0.83 and chosen task arithmetic's 0.82 + 0.01 are equal but for noise.
    assert "equivalent: fisher_merging" in found["H1"]
    assert "equivalent: slerp" in found["Average"]
    assert found["H2"] == found["H3"] == found["H5"] == found["Ranks"] == NOT_MEASURED
    assert "towards joint training (98.9): simple_average goes from" in found["H4"]
    # 0.04 of the 0.14 between 0.80 and 0.94.
    assert "29 % of the gap" in found["H4"] or "28 % of the gap" in found["H4"]
    assert found["H6"].index("late") < found["H6"].index("affine")
    assert "affine 0 % (+0.0 ± 0.0, not shown to differ from 0)" in found["H6"]
    assert "Of 2 comparisons, 2 better than random draws: norm on a" in found["H7"]
    # 0.05 of each accuracy, of experts with 0.95 and 0.85.
    assert "recalibration gains over merged statistics +5.6 ± 0.0 points" in found["BN"]
    assert found["BN"].startswith("a: ")  # one setting: no mean over settings
    assert "a set per task gains over one recalibrated set +2.2 ± 0.0 points" in found["BN"]


def test_settings_are_counted_and_ranked(sweep: Sweep) -> None:
    found = told(small_benchmark(sweep, settings=("a", "b", "c"), seeds=3))
    assert "Over 3 settings, against chosen task arithmetic" in found["H1"]
    # 0.88 against 0.82 and the 0.01 of the choice, of experts with 0.95 and 0.85.
    assert "regmean 3 / 0 / 0 / 0 (+5.6)" in found["H1"]
    assert found["Ranks"].startswith("Mean ranks over 3 settings")
    over = "Over 3 settings, recalibration gains over merged statistics +5.6 points, from +5.6 (a)"
    assert found["BN"].startswith(over)
    assert found["H6"].startswith("Of the gap, in the mean of 3 settings: late 6")
    assert "regmean 1.0" in found["Ranks"]


@pytest.mark.parametrize("left", ["benchmark_controls", "task_arithmetic", "simple_average"])
def test_what_is_missing_is_said_and_nothing_fails(sweep: Sweep, left: str) -> None:
    small_benchmark(sweep, seeds=2)
    for run in (sweep.folder / "a" / left).iterdir():
        (run / "report.json").unlink()
    found = told(sweep)
    if left == "benchmark_controls":
        assert set(found.values()) == {NOT_MEASURED}
    elif left == "task_arithmetic":
        assert found["H1"] == NOT_MEASURED
        assert found["Average"] != NOT_MEASURED
    else:  # the control of the same name stands in
        assert "a (the simple average: " in found["Average"]


def test_one_seed_decides_nothing(sweep: Sweep) -> None:
    found = told(small_benchmark(sweep, seeds=1))
    assert "undecided: " in found["H1"]
    assert "better: " not in found["H1"]
    assert "one seed" in found["H1"]


def test_zipping_is_asked_where_there_is_no_base(sweep: Sweep) -> None:
    rng = np.random.default_rng(0)
    for setting in ("apart", "from_one_base"):
        for seed in range(4):
            base = {"base": 0.5} if setting == "from_one_base" else {}
            sweep.controls(seed, base, setting=setting)
            for method, level in (("zipit", 0.8), ("git_rebasin", 0.7)):
                value = level + 0.002 * rng.standard_normal()
                sweep.methods(method, seed, {"merged": value}, setting=setting)
    found = told(sweep)["H5"]
    assert found.startswith("apart: zipit against git_rebasin +11.")
    assert "better" in found
    assert "from_one_base" not in found


def test_variants_are_held_against_the_usual_form(sweep: Sweep) -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        sweep.controls(seed, {})
        noise = 0.001 * rng.standard_normal(3)
        conditions = {"merged": 0.8 + noise[0], "kernel split, recalibrate": 0.85 + noise[1]}
        sweep.methods("iso_c", seed, {**conditions, "rows normalised, recalibrate": 0.8 + noise[2]})
    found = told(sweep)
    assert found["H2"].startswith("iso_c on a, against its usual form: better: kernel split (+5.")
    assert "rows normalised" in found["H3"]


def test_variants_are_counted_over_settings_and_held_against_chosen_options(sweep: Sweep) -> None:
    for setting in ("a", "b"):
        for seed in range(3):
            sweep.controls(seed, {}, setting=setting)
            conditions = {"merged": 0.5, "chosen, recalibrate": 0.8 + 0.001 * seed}
            conditions["kernel split, recalibrate"] = 0.7
            sweep.methods("iso_c", seed, conditions, setting=setting)
    found = told(sweep)["H2"]
    assert "against the usual form of iso_c, better / equivalent / worse / undecided" in found
    # 0.101 of experts with 0.95 and 0.85.
    assert "kernel split 0 / 0 / 2 / 0 (−11.3)" in found


def test_no_comparison_mixes_tracks_or_seeds(sweep: Sweep) -> None:
    for seed in range(3):
        sweep.controls(seed, {})
        chosen = {} if seed == 2 else {"chosen, recalibrate": 0.9}
        sweep.methods("task_arithmetic", seed, {"merged": 0.8, **chosen})
        sweep.methods("slerp", seed, {"merged": 0.7 + 0.01 * seed})
    found = sweep.measured()
    best = at_its_best(found)
    assert best[best["method"] == "task_arithmetic"]["seed"].tolist() == [0, 1]
    assert best[best["method"] == "slerp"]["seed"].tolist() == [0, 1, 2]
    assert against_task_arithmetic(found)["pairs"].tolist() == [2]


def test_holm_is_within_a_setting_or_over_all(sweep: Sweep) -> None:
    found = small_benchmark(sweep, settings=("a", "b"), seeds=3).measured()
    best = at_its_best(found)
    reference = best[best["method"] == "slerp"]
    others = best[best["method"].isin(("regmean", "adamerging"))]
    within, over = (compare(others, reference, one_family=one) for one in (False, True))
    assert within["p_holm"].min() == pytest.approx(2 * within["p"].min())
    assert over["p_holm"].min() == pytest.approx(4 * over["p"].min())
    assert len(compare(others, reference.iloc[:0])) == 0


def test_ranks_are_of_a_block_without_gaps(sweep: Sweep) -> None:
    small_benchmark(sweep, settings=("a", "b"), seeds=2)
    sweep.controls(0, {}, setting="apart")
    sweep.methods("slerp", 0, {"merged": 0.8}, setting="apart")
    sweep.methods("iso_c", 0, {"merged": 0.8}, setting="a")
    block = shared_block(at_its_best(sweep.measured()))
    assert list(block.index) == ["a", "b"]
    assert "iso_c" not in block.columns
    assert block.shape[1] == 7
