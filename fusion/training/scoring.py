"""Loss, accuracy and F1 of many batches, gathered without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.training.history import Scores


class Scorer:
    """Collects the batches of one pass; with several processes, of all of them together."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, logits (n, classes) and labels (n,)."""
        self._losses.append(loss.detach() * len(labels))
        self._predictions.append(logits.detach().argmax(1))
        self._labels.append(labels)

    def compute(self, num_classes: int) -> Scores:
        """Return the scores of everything added; every process must take part."""
        # One update a pass: for small networks an update a batch costs more than the batch.
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        predictions, labels = torch.cat(self._predictions), torch.cat(self._labels)
        mean_loss = torch.stack(self._losses).sum() / len(labels)
        loss = MeanMetric(nan_strategy="disable").to(labels.device)
        loss.update(mean_loss, weight=len(labels))
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        f1 = MulticlassF1Score(num_classes, average="weighted", validate_args=False)
        for metric in (accuracy, f1):
            metric.to(labels.device).update(predictions, labels)
        return Scores(*(float(metric.compute()) for metric in (loss, accuracy, f1)))
