"""A network under evaluation: its answers to each task and their scores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.models import MultiTaskNetwork
from fusion.taskpool.answers import Answer, Call

log = logging.getLogger(__name__)

_SHARES = ("accuracy", "f1", "calibration_error", "loss")
_BINS = 15  # of confidence, for the calibration error, as in Guo et al. (2017)


class Tally:
    """Counter of the answers of one network on one task.

    Args:
        columns: index of the score of each class of the task.
        outputs: number of scores.
        classes: the task's classes.
        device: where the scores are.
    """

    def __init__(
        self,
        columns: Sequence[int],
        outputs: int,
        classes: LabelSpace,
        device: torch.device,
    ) -> None:
        from torchmetrics import MeanMetric, SumMetric
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassCalibrationError,
            MulticlassF1Score,
        )

        self._columns = torch.tensor(list(columns), device=device)
        self._shown = classes.shown
        self._metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(outputs, average="micro").to(device),
            "f1": MulticlassF1Score(outputs, average="weighted").to(device),
            "class_accuracy": MulticlassAccuracy(outputs, average="none").to(device),
            "calibration_error": MulticlassCalibrationError(outputs, n_bins=_BINS).to(device),
            "loss": MeanMetric().to(device),
            "images": SumMetric().to(device),
        }

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch: scores (n, outputs) and the task's own labels (n,)."""
        columns = self._columns[targets]
        scores = scores.float()
        for name in ("accuracy", "f1", "class_accuracy"):
            self._metrics[name].update(scores, columns)
        self._metrics["calibration_error"].update(scores.softmax(1), columns)
        losses = nn.functional.cross_entropy(scores, columns, reduction="none")
        self._metrics["loss"].update(losses)
        self._metrics["images"].update(len(targets))

    def result(self) -> dict[str, Any]:
        """Return all metrics of the images so far, over all processes."""
        found: dict[str, Any] = {name: float(self._metrics[name].compute()) for name in _SHARES}
        found["images"] = int(self._metrics["images"].compute())
        per_class = self._metrics["class_accuracy"].compute()[self._columns].tolist()
        found["class_accuracy"] = dict(zip(self._shown, per_class, strict=True))
        return found


class Examinee:
    """A network under evaluation: its answers to each question and their scores.

    Args:
        name: its name in the log.
        device: its device.
        answers: question → answer; ``None`` where the network has none.
        tasks: the network, if it has several tasks whose outputs are best computed together.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        answers: Mapping[str, Answer | None],
        tasks: MultiTaskNetwork | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.tasks = tasks
        self._answers = dict(answers)
        self._tallies: dict[str, Tally] = {}

    def answer(
        self, question: str, classes: LabelSpace, images: Tensor, targets: Tensor, call: Call
    ) -> None:
        """Answer a question on a batch of images and count the results.

        Args:
            question: a task, or the joint problem.
            classes: its classes.
            images: (n, C, H, W).
            targets: (n,) the question's own labels.
            call: runs a network.

        Raises:
            UserError: the network does not return one row of scores per image.
        """
        answer = self._answers[question]
        if answer is None:
            return
        scores = answer.scores(images, call)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            shown = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(
                f"task '{question}' needs one row of class scores per image; "
                f"'{self.name}' returned {shown} for {len(images)} images"
            )
        if question not in self._tallies:
            columns = answer.columns(classes, scores.shape[1])
            if columns is None:
                self._answers[question] = None
                return
            if answer.space is None:
                log.warning(
                    "The classes of '%s' are unknown: its outputs are taken to be the %d classes "
                    "of task '%s', in their order (the pool's option 'classes' says otherwise)",
                    self.name,
                    len(columns),
                    question,
                )
            self._tallies[question] = Tally(columns, scores.shape[1], classes, self.device)
        self._tallies[question].update(scores, targets)

    def results(self, questions: Iterable[str]) -> dict[str, Any]:
        """Return question → metrics, for the questions that were answered."""
        return {q: self._tallies[q].result() for q in questions if q in self._tallies}
