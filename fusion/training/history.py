"""Scores and times of a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Means over a set of images.

    Attributes:
        loss: cross-entropy in nats.
        accuracy: share of images classified correctly, 0 to 1.
        f1: F1 score of each class weighted by its number of images, 0 to 1.
    """

    loss: float
    accuracy: float
    f1: float


@dataclass(frozen=True)
class Epoch:
    """Scores of one pass over the training images.

    Attributes:
        train: scores of the batches as they were trained on, augmentation and dropout included.
        val: scores of the validation images after the pass, if there are any.
        seconds: wall time of the pass, validation included.
    """

    train: Scores
    val: Scores | None
    seconds: float


@dataclass(frozen=True)
class History:
    """A whole training run.

    Attributes:
        epochs: one entry per pass.
        trained_parameters: number of trained parameters.
    """

    epochs: tuple[Epoch, ...]
    trained_parameters: int

    @property
    def seconds(self) -> float:
        """Wall time of all passes, validation included."""
        return sum(epoch.seconds for epoch in self.epochs)
