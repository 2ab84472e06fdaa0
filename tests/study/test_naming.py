from __future__ import annotations

from pathlib import Path

from fusion.study import read_runs
from fusion.study.naming import fixed_options, merge_names
from fusion.study.table import is_baseline, run_table, strategy_table


def test_names_say_what_varies_and_nothing_else(study: Path) -> None:
    assert merge_names(strategy_table(run_table(read_runs(study)))) == [
        "base, as it is",
        "LERP 10 %",
        "LERP 100 %",
        "TIES 10 %",
        "LERP 10 %, layers at random",
        "LERP 10 %, ranked by experts",
    ]


def test_a_method_of_somebody_elses_goes_by_its_name(leave) -> None:
    leave(job=0, method={"k": 3}, untuned=0.5)
    leave(job=1, method={"k": 3, "seed": 1}, untuned=0.6)
    folder = leave(job=2, method={"k": 4}, untuned=0.5)
    names = merge_names(strategy_table(run_table(read_runs(folder))))
    assert names == ["snr_selective_merge", "snr_selective_merge, k 4"]


def test_fixed_options_are_those_of_one_value(leave) -> None:
    leave(job=0, method={"k": 3, "top_p": 0.1}, untuned=0.5)
    folder = leave(job=1, method={"k": 3, "top_p": 0.2}, untuned=0.5)
    assert fixed_options(run_table(read_runs(folder)), "method") == {"k": 3}


def test_nothing_merged_is_the_base_with_its_batch_norm_treated(leave) -> None:
    folder = leave(job=0, method={"interpolation": "lerp", "top_p": 0.0}, untuned=0.9, merged=0)
    table = strategy_table(run_table(read_runs(folder)))
    assert merge_names(table) == ["base, batch norm recalibrated"]
    assert not is_baseline(table).any()
