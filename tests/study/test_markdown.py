from __future__ import annotations

from pathlib import Path

from fusion.study import read_runs
from fusion.study.markdown import lines, markdown_table
from fusion.study.table import run_table, strategy_table


def test_the_baseline_comes_first_and_the_best_is_marked(leave, study: Path) -> None:
    leave(job=9, untuned=0.87, tuned=0.90, strategy="head", same_as=("selective",))
    leave(job=10, untuned=0.87, tuned=0.95, strategy="full", seed=0)  # a repeated baseline
    (study / "0" / "report.json").unlink()
    shown = lines(strategy_table(run_table(read_runs(study))))
    assert [line.baseline for line in shown] == [True, *[False] * 6]
    assert shown[0].note == "baseline"
    assert shown[-1].note == "same as merged layers and the head"
    best = {line.merge: [cell.text for cell in line.cells if cell.best] for line in shown}
    assert best["LERP 100 %"] == ["93.0", "96.0", "95.0"]
    assert best["LERP 10 %"] == ["1.00", "10"]  # time and memory: the least is best


def test_markdown_has_a_row_a_strategy(study: Path) -> None:
    text = markdown_table(strategy_table(run_table(read_runs(study))))
    rows = [row.split(" | ") for row in text.strip().split("\n")]
    assert len(rows) == 2 + 6
    assert len({len(row) for row in rows}) == 1
    assert rows[2][0] == "| base, as it is"


def test_what_nobody_measured_has_no_column(leave) -> None:
    folder = leave(job=0, untuned=0.9)
    assert "time" not in markdown_table(strategy_table(run_table(read_runs(folder))))


def test_seeds_show_their_standard_error(leave) -> None:
    leave(job=0, untuned=0.90)
    folder = leave(job=1, untuned=0.92, seed=1)
    assert "91.0 ± 1.0" in markdown_table(strategy_table(run_table(read_runs(folder))))
