"""Inputs of a training step: a batch of one data set, or one batch per task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data import batches, number_of_batches, seed_from

TrainingData = Dataset[Any] | Mapping[str, Dataset[Any]]
"""Labelled images, or task → labelled images for a network of several tasks."""


@dataclass(frozen=True)
class Part:
    """The images of one task in a step.

    Attributes:
        task: the task; ``None`` for a network of one task.
        images: (n, C, H, W).
        labels: (n,).
    """

    task: str | None
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Feed:
    """Generator of the steps of every pass.

    With several tasks, each step has the same number of images of each task. A pass ends when the
    largest data set has been seen; smaller data sets are repeated.

    Attributes:
        data: one data set, or several by task.
        batch_size: images per step, over all tasks and processes together.
        max_batches: steps per pass, at most.
        device: device of the yielded images.
        seed: of order and augmentation.
        augment: apply the data sets' own augmentation.
        rank: number of this process.
        world_size: number of processes.
    """

    data: TrainingData
    batch_size: int
    device: torch.device
    max_batches: int | None = None
    seed: int = 0
    augment: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def steps(self) -> int:
        """Number of steps in a pass."""
        if not isinstance(self.data, Mapping):
            return self._number_of_batches(self.data, self.batch_size)
        return max(self._number_of_batches(d, self._share) for d in self.data.values())

    def epoch(self, number: int) -> Iterator[list[Part]]:
        """Yield the steps of pass ``number``, with one part per task."""
        if not isinstance(self.data, Mapping):
            own = seed_from(self.seed, "epoch", number)
            for images, labels in self._batches(self.data, self.batch_size, own):
                yield [Part(None, images, labels)]
            return
        streams = {
            task: self._endless(task, dataset, number) for task, dataset in self.data.items()
        }
        for _ in range(self.steps):
            yield [Part(task, *next(stream)) for task, stream in streams.items()]

    @property
    def _share(self) -> int:
        assert isinstance(self.data, Mapping)
        return max(1, self.batch_size // len(self.data))

    def _endless(
        self, task: str, dataset: Dataset[Any], number: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        turn = 0
        while True:
            own = seed_from(self.seed, "epoch", number, task, turn)
            yield from self._batches(dataset, self._share, own)
            turn += 1

    def _number_of_batches(self, dataset: Dataset[Any], size: int) -> int:
        limit = None if self.max_batches is None else self.max_batches * size
        return number_of_batches(dataset, batch_size=size, limit=limit, drop_last=True)

    def _batches(
        self, dataset: Dataset[Any], size: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(
            dataset,
            batch_size=size,
            device=self.device,
            shuffle=True,
            seed=seed,
            augment=self.augment,
            limit=None if self.max_batches is None else self.max_batches * size,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=True,
        )
