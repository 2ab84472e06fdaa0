from __future__ import annotations

import math
from pathlib import Path

import pytest

from fusion.study import read_runs
from fusion.study.table import is_base, is_baseline, run_table, strategy_table

LERP = {"top_p": 0.1, "interpolation": "lerp", "rank_by": "pretrained"}


def test_a_run_is_a_row_with_every_choice_and_figure(study: Path) -> None:
    table = run_table(read_runs(study)).set_index("run")
    row = table.loc["2"]
    assert (row["method"], row["strategy"], row["seed"]) == ("snr_selective_merge", "selective", 0)
    assert (row["method.interpolation"], row["method.top_p"]) == ("lerp", 1.0)
    assert row["merged_accuracy"] == 0.93
    assert row["finetuned_f1"] == pytest.approx(0.95)
    assert row["digits/control/accuracy"] == row["control_accuracy"] == 0.9
    assert row["consistency_all_layers"] == 0.5
    assert row["merged_layers"] == 2
    assert is_baseline(table)[["0", "1"]].tolist() == [True, False]
    assert is_base(table).sum() == 1


def test_seeds_become_mean_and_standard_error(leave) -> None:
    for job, (seed, accuracy) in enumerate([(0, 0.90), (1, 0.94), (2, 0.98)]):
        folder = leave(job=job, seed=seed, method=LERP, untuned=accuracy)
    folder = leave(job=3, seed=0, method={**LERP, "top_p": 0.2}, untuned=0.5)
    strategies = strategy_table(run_table(read_runs(folder)))
    assert strategies["seeds"].tolist() == [3, 1]
    assert strategies["merged_accuracy"].tolist() == pytest.approx([0.94, 0.5])
    assert strategies["merged_accuracy_error"][0] == pytest.approx(0.04 / math.sqrt(3))
    assert math.isnan(strategies["merged_accuracy_error"][1])


def test_what_did_not_finish_counts_in_no_mean(leave) -> None:
    folder = leave(job=0, method=LERP, untuned=0.9)
    (folder / "1" / ".running-x").mkdir(parents=True)
    table = run_table(read_runs(folder))
    assert table["status"].tolist() == ["finished", "unfinished"]
    assert strategy_table(table)["seeds"].tolist() == [1]


def test_options_that_are_lists_are_choices_too(leave) -> None:
    leave(job=0, method={**LERP, "rank_by": ["a", "b"]}, untuned=0.9)
    folder = leave(job=1, method={**LERP, "rank_by": ["a"]}, untuned=0.8)
    assert len(strategy_table(run_table(read_runs(folder)))) == 2


def test_an_alignment_is_told(leave) -> None:
    import json

    folder = leave(job=0, method=LERP, untuned=0.9)
    file = folder / "0" / "report.json"
    content = json.loads(file.read_text())
    content["algorithm"]["alignment"] = {
        "a": {"changed": False, "cycle_consistency": 0.0},
        "b": {"changed": True, "cycle_consistency": 1e-9},
    }
    file.write_text(json.dumps(content))
    row = run_table(read_runs(folder)).iloc[0]
    assert bool(row["aligned"])
    assert row["cycle_consistency"] == 1e-9
