"""Loss, accuracy and F1 over many batches, accumulated without synchronising the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion.training.history import Scores


class Scorer:
    """Accumulator of the scores of one pass, over all processes together.

    Args:
        processes: number of participating processes. A single one must not wait for others that may
            exist: a member of a pool is trained by one process of a run while the rest wait for it.
    """

    def __init__(self, *, processes: int = 1) -> None:
        self._shared = processes > 1
        self._losses: list[Tensor] = []
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor, *, first: int = 0) -> None:
        """Add a batch: its mean loss, logits (n, classes) and labels (n,).

        Args:
            loss: mean over the batch.
            logits: (n, classes).
            labels: (n,).
            first: number of the first class, where several tasks are counted one after another.
        """
        self._losses.append(loss.detach() * len(labels))
        self._predictions.append(logits.detach().argmax(1) + first)
        self._labels.append(labels + first)

    def compute(self, num_classes: int) -> Scores:
        """Return the scores of everything added; every process must call this."""
        # One update per pass: for small networks an update per batch costs more than the batch.
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        predictions, labels = torch.cat(self._predictions), torch.cat(self._labels)
        mean_loss = torch.stack(self._losses).sum() / len(labels)
        loss = MeanMetric(nan_strategy="disable", sync_on_compute=self._shared).to(labels.device)
        loss.update(mean_loss, weight=len(labels))
        options: dict[str, Any] = {"validate_args": False, "sync_on_compute": self._shared}
        accuracy = MulticlassAccuracy(num_classes, average="micro", **options)
        f1 = MulticlassF1Score(num_classes, average="weighted", **options)
        for metric in (accuracy, f1):
            metric.to(labels.device).update(predictions, labels)
        return Scores(*(float(metric.compute()) for metric in (loss, accuracy, f1)))
