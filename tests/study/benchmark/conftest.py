"""Folders as a sweep of the benchmark leaves them, with accuracies that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.study.benchmark.table import Measured, measured
from fusion.study.runs import read_runs

TASKS = ("letters", "digits")
NEEDS = {
    "simple_average": [],
    "slerp": [],
    "task_arithmetic": ["a pretrained model"],
    "ties_merging": ["a pretrained model"],
    "regmean": ["images without labels"],
    "fisher_merging": ["labelled images"],
    "adamerging": ["a pretrained model", "gradients", "images without labels"],
}
IMAGES = 500


def metrics(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "f1": accuracy, "calibration_error": 0.05, "images": IMAGES}


@dataclass
class Sweep:
    """Writes runs; accuracies are of the first task, the second's are 0.1 lower."""

    folder: Path
    jobs: int = 0

    def methods(self, method: str, seed: int, conditions: Mapping[str, float], **more: Any) -> None:
        """Leave a method's run: its conditions by name, ``merged`` the defaults."""
        told = {}
        for name in conditions:
            track, _, treatment = name.partition(", ")
            if name == "merged":
                track, treatment = "defaults", "recalibrate"
            if track == "oracle head":
                treatment = "recalibrate"
            told[name] = {"track": track, "batch_norm": treatment}
        self._leave(method, seed, conditions, told, needs=NEEDS.get(method, []), **more)

    def controls(self, seed: int, conditions: Mapping[str, float], **more: Any) -> None:
        """Leave the run of the controls: the experts have 0.95 and 0.85."""
        told = {name: {"track": name} for name in conditions}
        told["merged"] = {"track": "average"}
        self._leave(
            "benchmark_controls", seed, {"merged": 0.8, **conditions}, told, experts=True, **more
        )

    def error(self, method: str, seed: int, kind: str, message: str, *, setting: str = "a") -> None:
        run = self.folder / setting / method / f"seed_{seed}"
        run.mkdir(parents=True)
        told = {"job": self.jobs, "kind": kind, "mistake": True, "message": message}
        (run / "error.json").write_text(json.dumps(told))
        self.jobs += 1

    def measured(self) -> Measured:
        return measured(read_runs(self.folder))

    def _leave(
        self,
        method: str,
        seed: int,
        accuracies: Mapping[str, float],
        conditions: Mapping[str, Any],
        *,
        setting: str = "a",
        needs: list[str] = [],  # noqa: B006
        experts: bool = False,
        joint: Mapping[str, float] | None = None,
    ) -> None:
        evaluation: dict[str, Any] = {
            name: {"letters": metrics(value), "digits": metrics(value - 0.1)}
            for name, value in accuracies.items()
        }
        for name, value in (joint or {}).items():
            evaluation.setdefault(name, {})["joint"] = metrics(value)
            conditions = {name: {"track": name}, **conditions}
        if experts:
            for task, accuracy in zip(TASKS, (0.95, 0.85), strict=True):
                evaluation[f"expert: {task}"] = {task: metrics(accuracy)}
                conditions = {**conditions, f"expert: {task}": {"track": f"expert: {task}"}}
        for told in conditions.values():
            told |= {"parameters": 1000, "multiply_adds": 5000, "seconds": 1.0}
        report = {
            "fusion": "0.1.0",
            "choices": {"method": method, "setting": setting, "modelpool": "p", "job": self.jobs},
            "seed": seed,
            "experts": {task: task for task in TASKS},
            "evaluation": evaluation,
            "algorithm": {"benchmarked": method, "needs": needs, "conditions": conditions},
        }
        self.jobs += 1
        run = self.folder / setting / method / f"seed_{seed}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "report.json").write_text(json.dumps(report))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def small_benchmark(sweep: Sweep, settings: tuple[str, ...] = ("a",), seeds: int = 5) -> Sweep:
    """Leave every method with a level of its own and noise that is the seed's, or its own."""
    rng = np.random.default_rng(0)
    levels = {"simple_average": 0.80, "slerp": 0.80, "task_arithmetic": 0.82, "ties_merging": 0.76,
              "regmean": 0.88, "fisher_merging": 0.83, "adamerging": 0.85}  # fmt: skip
    for setting in settings:
        for seed in range(seeds):
            shared = 0.02 * rng.standard_normal()
            sweep.controls(
                seed,
                {
                    "base": 0.5,
                    "joint training": 0.94,
                    "average per task": 0.82 + shared,
                    "own late": 0.90 + shared + 0.001 * rng.standard_normal(),
                    "own affine": 0.82 + shared,
                    "ranked by norm": 0.80 + 0.002 * rng.standard_normal(),
                    "ranked by hybrid": 0.78 + 0.002 * rng.standard_normal(),
                    "ranked by random, draw 1": 0.76 + 0.002 * rng.standard_normal(),
                    "ranked by random, draw 2": 0.75 + 0.002 * rng.standard_normal(),
                },
                setting=setting,
                joint={"ensemble": 0.7},
            )
            for method, level in levels.items():
                value = level + shared + 0.0005 * rng.standard_normal()
                conditions = {
                    "merged": value,
                    "defaults, recalibrate_per_task": value + 0.02,
                    "defaults, merge": value - 0.05,
                    "oracle head": value + 0.04,
                }
                if method in ("task_arithmetic", "ties_merging"):
                    conditions["chosen, recalibrate"] = value + 0.01
                sweep.methods(method, seed, conditions, setting=setting)
    return sweep
