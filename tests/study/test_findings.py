from __future__ import annotations

from pathlib import Path

import pytest

from fusion.study import read_runs
from fusion.study.findings import baseline_row, control_accuracy, findings
from fusion.study.table import run_table, strategy_table


def test_changes_and_savings_are_against_the_base_trained_in_full(study: Path) -> None:
    table = strategy_table(run_table(read_runs(study)))
    assert table["accuracy_change"].tolist() == pytest.approx(
        [0.0, -0.01, 0.01, -0.02, -0.005, -0.015]
    )
    assert table["time_saving"].tolist()[:3] == pytest.approx([0.0, 0.75, 0.5])


def test_findings_are_the_numbers_of_the_table(study: Path) -> None:
    text = " ".join(findings(strategy_table(run_table(read_runs(study)))))
    assert "reaches 95.0 % in 4.0 s" in text
    assert "without any training is LERP 100 %, at 93.0 %" in text
    assert "has 90.0 %, unmerged" in text
    assert "the best is LERP 100 %, at 96.0 %: +1.0 points" in text
    assert "50 % less time and 50 % less memory" in text
    # sqrt(0.93 · 0.07 / 531)
    assert "On 531 test images an accuracy near 93.0 % is known to ± 1.1 points" in text
    assert "1 of 5 merges reach the baseline so" in text
    # LERP 10 % against as many layers at random: 92.0 - 91.0 and 94.0 - 94.5.
    assert "is worth +1.0 points before fine-tuning and −0.5 points after" in text


def test_without_a_baseline_nothing_is_held_against_it(leave) -> None:
    merge = {"interpolation": "lerp", "top_p": 0.1}
    folder = leave(job=0, method=merge, untuned=0.9, tuned=0.92, strategy="head")
    strategies = strategy_table(run_table(read_runs(folder)))
    assert baseline_row(strategies) is None
    assert strategies["accuracy_change"].isna().all()
    assert not any("baseline" in sentence for sentence in findings(strategies))
    assert control_accuracy(strategies) == 0.9


def test_unequal_times_of_equal_work_are_told(leave) -> None:
    for job, seconds in enumerate((4.0, 16.0)):
        merge = {"interpolation": "lerp", "top_p": 0.1 * (job + 1)}
        folder = leave(job=job, method=merge, untuned=0.9, tuned=0.92, seconds=seconds)
    strategies = strategy_table(run_table(read_runs(folder)))
    assert "between 4.0 and 16.0 s" in findings(strategies)[-1]
    steady = strategies.assign(training_seconds=4.0)
    assert not any("Beware" in sentence for sentence in findings(steady))


def test_changes_are_between_runs_of_one_seed(leave) -> None:
    """Seeds differ more from each other than merge and baseline do within one."""
    merge = {"interpolation": "lerp", "top_p": 0.1}
    for seed, level in enumerate((0.80, 0.90)):
        leave(job=2 * seed, seed=seed, untuned=0.5, tuned=level)
        folder = leave(job=2 * seed + 1, seed=seed, method=merge, untuned=0.5, tuned=level + 0.02)
    strategies = strategy_table(run_table(read_runs(folder)))
    assert strategies["accuracy_change"].tolist() == pytest.approx([0.0, 0.02])
    assert strategies["accuracy_change_error"].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert strategies["finetuned_accuracy_error"][1] == pytest.approx(0.05)
