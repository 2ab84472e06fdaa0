"""Folders of runs as a sweep leaves them: reports without the hours that real ones take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.study import summarise
from fusion.study.summarise import Summary

Leave = Callable[..., Path]


def scores(accuracy: float) -> dict[str, Any]:
    return {"digits": {"accuracy": accuracy, "f1": accuracy - 0.01, "images": 531}}


def report(
    *,
    job: int,
    untuned: float,
    tuned: float | None = None,
    strategy: str = "full",
    method: dict[str, Any] | None = None,
    seed: int = 0,
    seconds: float = 4.0,
    same_as: tuple[str, ...] = (),
    merged: int = 2,
) -> dict[str, Any]:
    """Return a report; without ``method`` options the base as it is."""
    evaluation = {"merged": scores(untuned)}
    finetune = None
    if tuned is not None:
        evaluation["finetuned"] = scores(tuned)
        finetune = {
            "strategy": strategy,
            "same_as": list(same_as),
            "seconds": seconds,
            "peak_bytes": 2**20 * int(10 * seconds),
            "memory": "rss",
            "trained_parameters": 1000,
        }
    algorithm: dict[str, Any] = {}
    if method is not None:
        evaluation["the control"] = scores(0.9)
        algorithm = {
            "selected_layers": ["a", "b"][:merged],
            "batch_norm": "recalibrate",
            "candidate_layers": 20,
            "consistency": {"all layers": {"mean": 0.5}, "merged layers": {"mean": 1.0}},
        }
    return {
        "fusion": "0.1.0",
        "choices": {
            "method": "dummy" if method is None else "snr_selective_merge",
            "modelpool": "digits",
            "taskpool": "digits",
            "overrides": ["modelpool=digits", "+note=a b"],
            "job": job,
        },
        "options": {
            "method": {} if method is None else {**method, "seed": seed},
            "finetune": {} if finetune is None else {"strategy": strategy, "seed": seed},
        },
        "method": "DummyAlgorithm" if method is None else "SNRSelectiveMerge",
        "models": ["_pretrained_", "a", "b"],
        "seed": seed,
        "evaluation": evaluation,
        "controls": [] if method is None else ["the control"],
        "finetune": finetune,
        "algorithm": algorithm,
        "seconds": {"run": 1.0, "evaluate": 0.5},
        "environment": {"device": "cpu", "cores": 2, "time": "2025-01-02T03:04:05+0000"},
    }


def leave_in(folder: Path) -> Leave:
    """Return what writes one run's report into a sweep's folder and returns that folder."""

    def write(**options: Any) -> Path:
        content = report(**options)
        run = folder / str(content["choices"]["job"])
        run.mkdir(exist_ok=True)
        (run / "report.json").write_text(json.dumps(content))
        (run / "config.yaml").write_text("seed: 0\n")
        return folder

    return write


def small_study(leave: Leave) -> Path:
    """A baseline, two shares of LERP, TIES, chance, another ranking."""
    leave(job=0, untuned=0.87, tuned=0.95, strategy="full", seconds=4.0)
    runs = [
        ("lerp", 0.1, "pretrained", 0.92, 0.94, 1.0),
        ("lerp", 1.0, "pretrained", 0.93, 0.96, 2.0),
        ("ties", 0.1, "pretrained", 0.80, 0.93, 1.5),
        ("lerp", 0.1, "random", 0.91, 0.945, 1.2),
        ("lerp", 0.1, "experts", 0.90, 0.935, 1.1),
    ]
    for number, (kind, share, rank, zero, tuned, seconds) in enumerate(runs, start=1):
        folder = leave(
            job=number,
            method={"top_p": share, "rank_by": rank, "interpolation": kind},
            untuned=zero,
            tuned=tuned,
            seconds=seconds,
            strategy="selective",
        )
    return folder


@pytest.fixture
def leave(tmp_path: Path) -> Leave:
    return leave_in(tmp_path)


@pytest.fixture
def study(leave: Leave) -> Path:
    return small_study(leave)


@pytest.fixture(scope="session")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """The small study with a job that failed, summarised once for all who only look."""
    folder = small_study(leave_in(tmp_path_factory.mktemp("study")))
    (folder / "command.txt").write_text("fusion_bench experiment=<study>\n")
    (folder / "9").mkdir()
    error = {"kind": "UserError", "message": "lr: <too high>", "mistake": True}
    (folder / "9" / "error.json").write_text(json.dumps(error))
    return summarise(folder)
