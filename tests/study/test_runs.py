from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.study.runs import Run, read_runs, troubles


def test_runs_stand_in_the_order_of_their_jobs(leave) -> None:
    for job in (10, 2, 1):
        folder = leave(job=job, untuned=0.9)
    assert [run.name for run in read_runs(folder)] == ["1", "2", "10"]


def test_failed_and_unfinished_runs_are_told_apart(study: Path) -> None:
    (study / "failed").mkdir()
    (study / "cut off" / ".running-x").mkdir(parents=True)
    (study / "cut off" / ".running-x" / "report.json").write_text("{}")
    (study / "failed" / "error.json").write_text(
        json.dumps({"kind": "RuntimeError", "message": "no memory", "mistake": False})
    )
    runs = {run.name: run for run in read_runs(study)}
    assert (runs["failed"].status, runs["failed"].error) == ("failed", "RuntimeError: no memory")
    assert runs["cut off"].status == "unfinished"
    assert runs["0"].status == "finished"


def test_a_folder_without_runs_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run in"):
        read_runs(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_runs(tmp_path / "nowhere")


def test_a_broken_report_is_named(study: Path) -> None:
    (study / "3" / "report.json").write_text('{"fusion":')
    with pytest.raises(UserError, match=r"3/report.json' is no JSON"):
        read_runs(study)


def test_one_reason_is_told_once() -> None:
    failed = [Run(str(job), "failed", {}, "UserError: no", job) for job in range(5)]
    cut = Run("9", "unfinished", {})
    assert troubles([*failed, cut]) == ["0, 1, 2 and 2 more: UserError: no", "9: not finished"]
