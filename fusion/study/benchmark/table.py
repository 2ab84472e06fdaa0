"""One row per run and condition of the benchmark, and one per task of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pandas as pd

from fusion.study.benchmark.statistics import binomial_error
from fusion.study.runs import FINISHED, Run

CONTROLS = "benchmark_controls"  # the method whose job measures what all others are compared with
JOINT = "joint"  # the question which class of which task an image shows
EXPERT = "expert: "
DEFAULTS, CHOSEN, ORACLE, AVERAGE = "defaults", "chosen", "oracle head", "average"
RECALIBRATE, PER_TASK, MERGED_STATISTICS = "recalibrate", "recalibrate_per_task", "merge"
WITHOUT_STATISTICS = "pretrained"  # the treatment of a network that has no batch norm

# What a method cannot do without, from the least to the most; it belongs to its last.
NOTHING = "nothing"
NEEDS = (NOTHING, "a pretrained model", "images without labels", "labelled images", "gradients")
NO_DATA, IMAGES, LABELS = "no data", "images", "labels"
DATA = (NO_DATA, IMAGES, LABELS)

COLUMNS = (
    "run", "setting", "method", "seed", "condition", "track", "batch_norm", "needs", "group",
    "data", "score", "worst", "accuracy", "joint", "calibration_error", "test_error", "parameters",
    "multiply_adds", "seconds", "images", "labels", "chosen",
)  # fmt: skip
TASK_COLUMNS = (
    "run", "setting", "method", "seed", "condition", "task", "accuracy", "expert", "images",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What the benchmark's finished runs measured.

    Attributes:
        conditions: a row per run and condition. ``score`` is the mean over tasks of the accuracy
            in percent of that of the task's expert in the same setting and seed, ``worst`` the
            least of them, both missing until the job of the controls has run; ``accuracy``,
            ``joint`` and ``calibration_error`` are shares; ``test_error`` is the standard error
            of the score due to the test images, if the tasks share them; ``group`` is the most that
            the method needs, ``data`` what the condition looks at.
        tasks: a row per run, condition and task: accuracy, its expert's, number of test images.
    """

    conditions: pd.DataFrame
    tasks: pd.DataFrame

    @property
    def methods(self) -> pd.DataFrame:
        """The conditions of the methods, without the controls."""
        return self.conditions[self.conditions["method"] != CONTROLS]

    @property
    def controls(self) -> pd.DataFrame:
        """The conditions of the job of the controls."""
        return self.conditions[self.conditions["method"] == CONTROLS]

    @property
    def settings(self) -> list[str]:
        """The settings, in the order of their first runs."""
        return list(dict.fromkeys(self.conditions["setting"]))

    def csv(self) -> str:
        """Return the conditions with a column per task's accuracy as CSV."""
        keys = ["run", "condition"]
        wide = self.tasks.pivot_table(index=keys, columns="task", values="accuracy", sort=False)
        wide.columns = [f"accuracy: {task}" for task in wide.columns]
        return self.conditions.merge(wide.reset_index(), on=keys, how="left").to_csv(
            index=False, float_format="%.10g"
        )


def is_benchmark(runs: Sequence[Run]) -> bool:
    """Return whether a finished run is one of the benchmark."""
    return any("benchmarked" in run.report.get("algorithm", {}) for run in runs)


def measured(runs: Sequence[Run]) -> Measured:
    """Read every finished run of the benchmark.

    Settings are in the order of their controls, whichever jobs were run again later.
    """
    ours = [
        run
        for run in runs
        if run.status == FINISHED and "benchmarked" in run.report.get("algorithm", {})
    ]
    controls = [run for run in ours if _method(run) == CONTROLS]
    experts = {_key(run): _experts(run) for run in controls}
    order = list(dict.fromkeys(map(_setting, (*controls, *ours))))
    ours.sort(key=lambda run: order.index(_setting(run)))
    conditions: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    for run in ours:
        for condition, rows in _conditions(run, experts.get(_key(run), {})):
            conditions.append(condition)
            tasks += rows
    return Measured(
        pd.DataFrame(conditions, columns=COLUMNS), pd.DataFrame(tasks, columns=TASK_COLUMNS)
    )


def place_of(run: Run) -> tuple[str, str]:
    """Return setting and method of a run, by its report or, where it has none, by its folder."""
    if run.status == FINISHED:
        return _setting(run), _method(run)
    parts = PurePosixPath(run.name).parts
    return (parts[-3] if len(parts) > 2 else "?"), (parts[-2] if len(parts) > 1 else "?")


def _setting(run: Run) -> str:
    """Return the setting by name; of a run without one, its pool."""
    choices = run.report.get("choices", {})
    given = [o for o in choices.get("overrides", []) if o.startswith("setting=")]
    name = choices.get("setting") or (given[-1].partition("=")[2] if given else None)
    return str(name or choices.get("modelpool"))


def _method(run: Run) -> str:
    algorithm = run.report["algorithm"]
    return str(run.report.get("choices", {}).get("method") or algorithm["benchmarked"])


def _key(run: Run) -> tuple[str, Any]:
    return _setting(run), run.report.get("seed")


def _experts(run: Run) -> dict[str, float]:
    """Return task → accuracy of its expert; of a task that is nobody's own, of the best expert."""
    found: dict[str, float] = {}
    own = run.report.get("experts", {})
    for name, results in run.report["evaluation"].items():
        if not name.startswith(EXPERT):
            continue
        for task, metrics in results.items():
            if task in own and own[task] != name.removeprefix(EXPERT):
                continue
            found[task] = max(found.get(task, 0.0), metrics["accuracy"])
    return found


def _conditions(
    run: Run, experts: Mapping[str, float]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield of every condition its row and the rows of its tasks."""
    algorithm = run.report["algorithm"]
    needs = [str(need) for need in algorithm.get("needs", [])]
    method = _method(run)
    for name, told in algorithm.get("conditions", {}).items():
        results = run.report["evaluation"].get(name)
        if not results:
            continue  # it answers no task: the ensemble of experts with classes in common
        key = {
            "run": run.name,
            "setting": _setting(run),
            "method": method,
            "seed": run.report.get("seed"),
            "condition": name,
        }
        tasks = [
            {
                **key,
                "task": task,
                "accuracy": metrics["accuracy"],
                "expert": experts.get(task, math.nan),
                "images": metrics.get("images", math.nan),
            }
            for task, metrics in results.items()
            if task != JOINT
        ]
        yield (
            {
                **key,
                "track": told.get("track", name),
                "batch_norm": told.get("batch_norm"),
                "needs": ", ".join(sorted(needs, key=_place)) or NOTHING,
                "group": max(needs, key=_place, default=NOTHING),
                "data": _data(needs, told),
                **_scores(tasks, complete=name.startswith(EXPERT) or experts.keys() <= {*results}),
                "joint": results.get(JOINT, {}).get("accuracy"),
                "calibration_error": _mean(
                    [r.get("calibration_error") for t, r in results.items() if t != JOINT]
                ),
                **{
                    column: told.get(column)
                    for column in ("parameters", "multiply_adds", "seconds", "images", "labels")
                },
                "chosen": json.dumps(told["chosen"]) if told.get("chosen") else None,
            },
            tasks,
        )


def _scores(tasks: Sequence[Mapping[str, Any]], *, complete: bool) -> dict[str, float]:
    """Return score, worst task, mean accuracy and test error.

    All are missing of a network that does not answer the tasks of all experts: a mean over other
    tasks is no number to compare. Tasks that no expert answers count in the accuracy alone.
    """
    if not complete:
        return dict.fromkeys(("score", "worst", "accuracy", "test_error"), math.nan)
    known = [task for task in tasks if task["expert"] > 0]
    shares = [100 * task["accuracy"] / task["expert"] for task in known]
    errors = [
        100 * binomial_error(task["accuracy"], task["images"]) / task["expert"] for task in known
    ]
    return {
        "score": _mean(shares),
        "worst": min(shares, default=math.nan),
        "accuracy": _mean([task["accuracy"] for task in tasks]),
        "test_error": _mean(errors),
    }


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean; missing where there is no value or one is missing."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else math.nan


def _place(need: str) -> int:
    return NEEDS.index(need) if need in NEEDS else len(NEEDS)


def _data(needs: Sequence[str], condition: Mapping[str, Any]) -> str:
    """Return what data a condition looks at: of its method, its choice and its batch norm."""
    is_fitted = condition.get("chosen") or condition.get("track") in (CHOSEN, ORACLE)
    if is_fitted or "labelled images" in needs:
        return LABELS
    if str(condition.get("batch_norm")).startswith(RECALIBRATE) or "images without labels" in needs:
        return IMAGES
    return NO_DATA
