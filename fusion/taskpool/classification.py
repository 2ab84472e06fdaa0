"""Accuracy, weighted F1, loss and per-class accuracy of a classifier on named tasks."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.data import batches
from fusion.errors import UserError
from fusion.target import build, is_target
from fusion.taskpool.base import BaseTaskPool
from fusion.weights import image_dtype

log = logging.getLogger(__name__)


class ClassificationTaskPool(BaseTaskPool):
    """Measure a classifier on each of several data sets.

    A task's images and a model's outputs meet at the *original* labels of their classes: a model
    of ten classes is measured on a task of four of them over all its ten outputs (it may answer
    one of the other six, and is wrong then), and a model of four classes only on tasks that ask
    for no other class. Tasks that a model has no outputs for are left out of its result.

    Args:
        tasks: name → dataset, or a mapping with ``_target_`` that builds one when it is needed.
            A dataset may carry ``class_names`` and ``original_labels``.
        batch_size: images per forward pass.
        evaluate_members: whether a program also evaluates the pool's members.
        fast_dev_run: measure on one batch only.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        batch_size: int = 500,
        evaluate_members: bool = False,
        fast_dev_run: bool = False,
    ) -> None:
        if not tasks:
            raise UserError("taskpool.tasks is empty; give at least one task: name → dataset")
        if batch_size < 1:
            raise UserError(f"taskpool.batch_size must be at least 1, not {batch_size}")
        self._tasks = dict(tasks)
        self._labels: dict[str, tuple[int, ...]] = {}
        self.batch_size = batch_size
        self.evaluate_members = evaluate_members
        self.fast_dev_run = fast_dev_run

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, in their order."""
        return list(self._tasks)

    def load_dataset(self, task: str) -> Any:
        """Return a task's images, built at the first call."""
        if is_target(self._tasks[task]):
            self._tasks[task] = build(self._tasks[task])
        return self._tasks[task]

    def check(self) -> None:
        """Build every task's data set, so that a missing file is found before any work."""
        for task in self._tasks:
            self.load_dataset(task)

    def evaluate(self, model: nn.Module, *, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Return task → ``accuracy``, ``f1`` (weighted), ``loss``, ``images``, ``class_accuracy``.

        Accuracies and F1 are shares between 0 and 1; the loss is the mean cross-entropy in nats.

        Raises:
            UserError: no task asks only for classes that the model knows, or the model does not
                return one row of scores per image.
        """
        results: dict[str, Any] = {}
        with self._ready(model) as (network, device):
            for task in self._tasks:
                result = self._evaluate_task(network, task, device, classes)
                if result is not None:
                    results[task] = result
        if not results:
            raise UserError(
                f"the model answers none of the tasks {', '.join(self._tasks)}: each has classes "
                f"beyond the model's outputs"
                + ("" if classes is None else f", which stand for the labels {list(classes)}")
            )
        return results

    def _evaluate_task(
        self, model: nn.Module, task: str, device: torch.device, classes: Sequence[int] | None
    ) -> dict[str, Any] | None:
        from torchmetrics import MeanMetric, SumMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        dataset = self.load_dataset(task)
        labels = tuple(getattr(dataset, "original_labels", ()))
        metrics: dict[str, Any] = {}
        rows = torch.empty(0, dtype=torch.long)  # own label of the task -> column of the model
        dtype = image_dtype(model)
        for images, targets in self._batches(dataset, device):
            images = images.to(dtype)
            scores = model(images) if self.fabric is None else self._autocast(model, images)
            if not isinstance(scores, Tensor) or scores.ndim != 2:
                shown = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise UserError(
                    f"task '{task}' needs one row of class scores per image; "
                    f"the model returned {shown} for {len(images)} images"
                )
            if not metrics:
                outputs = scores.shape[1]
                known = tuple(classes) if classes is not None else tuple(range(outputs))
                if len(known) != outputs:
                    raise UserError(
                        f"the model has {outputs} outputs, its classes are given as {list(known)}"
                    )
                labels = labels or self._counted_labels(task, dataset)
                if not set(labels) <= set(known):
                    return None
                rows = torch.tensor([known.index(label) for label in labels], device=device)
                metrics = {
                    "accuracy": MulticlassAccuracy(outputs, average="micro").to(device),
                    "f1": MulticlassF1Score(outputs, average="weighted").to(device),
                    "class_accuracy": MulticlassAccuracy(outputs, average="none").to(device),
                    "loss": MeanMetric().to(device),
                    "images": SumMetric().to(device),
                }
            columns = rows[targets]
            scores = scores.float()
            for name in ("accuracy", "f1", "class_accuracy"):
                metrics[name].update(scores, columns)
            losses = nn.functional.cross_entropy(scores, columns, reduction="none")
            metrics["loss"].update(losses)
            metrics["images"].update(len(images))
        if not metrics:
            raise UserError(f"task '{task}' has no images")
        result: dict[str, Any] = {
            name: float(metrics[name].compute()) for name in ("accuracy", "f1", "loss")
        }
        result["images"] = int(metrics["images"].compute())
        per_class = metrics["class_accuracy"].compute()[rows].tolist()
        names = getattr(dataset, "class_names", None) or [str(label) for label in labels]
        result["class_accuracy"] = dict(zip(names, per_class, strict=True))
        return result

    def _counted_labels(self, task: str, dataset: Any) -> tuple[int, ...]:
        """Return 0, 1, … up to the largest label of a data set, looked up once."""
        if task not in self._labels:
            names = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
            largest = (
                len(names) - 1
                if names
                else max(int(dataset[index][1]) for index in range(len(dataset)))
            )
            self._labels[task] = tuple(range(largest + 1))
        return self._labels[task]

    def _batches(self, dataset: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        rank = 0 if self.fabric is None else self.fabric.global_rank
        world_size = 1 if self.fabric is None else self.fabric.world_size
        return batches(
            dataset,
            batch_size=self.batch_size,
            device=device,
            limit=self.batch_size if self.fast_dev_run else None,
            rank=rank,
            world_size=world_size,
        )

    def _autocast(self, model: nn.Module, images: Tensor) -> Any:
        assert self.fabric is not None
        with self.fabric.autocast():
            return model(images)

    @contextlib.contextmanager
    def _ready(self, model: nn.Module) -> Iterator[tuple[nn.Module, torch.device]]:
        """Yield the model in evaluation mode on the right device; leave it as it was."""
        here = next((p.device for p in model.parameters()), torch.device("cpu"))
        device = here if self.fabric is None else self.fabric.device
        network = model if here == device else copy.deepcopy(model).to(device)
        modes = {module: module.training for module in network.modules()}
        network.eval()
        try:
            with torch.inference_mode():
                yield network, device
        finally:
            for module, mode in modes.items():
                module.training = mode
