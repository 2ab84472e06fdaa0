"""Evaluation of the networks of a run, and their accuracies relative to the experts'."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fusion.labels import LabelSpace
from fusion.method import BaseAlgorithm
from fusion.method.ensemble import ensemble_of
from fusion.modelpool import BaseModelPool
from fusion.taskpool import BaseTaskPool, ClassificationTaskPool, Contestant

log = logging.getLogger(__name__)

MERGED = "merged"
FINETUNED = "finetuned"
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        results: name → task → metric → number.
        shares: name → task → accuracy as a share of the accuracy of the task's own expert.
        experts: task → the expert whose own task it is.
    """

    results: Mapping[str, Mapping[str, Any]]
    shares: Mapping[str, Mapping[str, float]]
    experts: Mapping[str, str]

    @property
    def means(self) -> dict[str, dict[str, float | None]]:
        """Heading → name → mean over the experts' own tasks; ``None`` where one is missing."""
        if len(self.experts) < 2:
            return {}
        accuracies = {
            name: _mean(
                [results[t]["accuracy"] for t in self.experts if t in results], self.experts
            )
            for name, results in self.results.items()
        }
        shares = {
            name: _mean(list(found.values()), self.experts) for name, found in self.shares.items()
        }
        return {"mean": accuracies, "of experts": shares}


def evaluate_run(
    model: nn.Module,
    algorithm: BaseAlgorithm,
    pool: BaseModelPool,
    tasks: BaseTaskPool,
    *,
    finetuned: nn.Module | None = None,
) -> Evaluation:
    """Measure the members and their ensemble (if requested), the controls and the result.

    Args:
        model: the result.
        algorithm: the algorithm that made it, with its controls.
        pool: the members.
        tasks: the task pool.
        finetuned: the result after fine-tuning.
    """
    labels = algorithm.result_labels(pool)
    contestants: dict[str, Contestant] = {}
    if tasks.evaluate_members:
        for name in pool.all_model_names:
            contestants[name] = Contestant(partial(pool.load_model, name), pool.labels(name))
        if len(pool) > 1 and isinstance(tasks, ClassificationTaskPool):
            contestants[ENSEMBLE] = Contestant(partial(ensemble_of, pool))
    for name, control in algorithm.controls.items():
        contestants[name] = Contestant(control, algorithm.record.labels.get(name, labels))
    contestants[MERGED] = Contestant(lambda: model, labels)
    if finetuned is not None:
        contestants[FINETUNED] = Contestant(lambda: finetuned, labels)
    log.info("Evaluating %s", ", ".join(contestants))
    results = {
        name: found
        for name, found in tasks.evaluate_all(contestants).items()
        if found or name == MERGED
    }
    if not results[MERGED]:
        log.warning("The result answers no task: it has the classes of none")
    experts = own_experts(pool, tasks)
    shares = {
        name: {
            task: found[task]["accuracy"] / results[expert][task]["accuracy"]
            for task, expert in experts.items()
            if task in found and results.get(expert, {}).get(task, {}).get("accuracy")
        }
        for name, found in results.items()
    }
    return Evaluation(results, shares, experts)


def own_experts(pool: BaseModelPool, tasks: BaseTaskPool) -> dict[str, str]:
    """Return task → the expert that was made for it: by the task's name, else by its classes."""
    if not isinstance(tasks, ClassificationTaskPool):
        return {}
    found: dict[str, str] = {}
    for task in tasks.task_names:
        named = [name for name in pool.model_names if pool.task(name) == task]
        classes = tasks.classes(task)
        equal = [
            name
            for name in pool.model_names
            if classes is not None and _equal(pool.labels(name), classes)
        ]
        candidates = named or (equal if len(equal) == 1 else [])
        if candidates:
            found[task] = candidates[0]
    return found


def _equal(labels: LabelSpace | None, classes: LabelSpace) -> bool:
    return labels is not None and len(labels) == len(classes) and labels.covers(classes)


def _mean(values: list[float], wanted: Mapping[str, str]) -> float | None:
    return math.fsum(values) / len(values) if values and len(values) == len(wanted) else None
