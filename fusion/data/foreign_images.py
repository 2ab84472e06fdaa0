"""Adapter of any map-style data set of (image, label) pairs to an image set of this package."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fusion.data.labelled_images import LabelledImages
from fusion.data.labels import class_names_of, labels_of, original_labels_of
from fusion.errors import UserError


class ForeignImages(LabelledImages):
    """A data set from outside of this package, whose labels and names have been looked up.

    Its images are normalised by the data set itself. One that states ``mean`` and ``std`` (one
    number per channel each, on the scale 0..1) has its pixels recovered where they are needed;
    of one that does not, the images are passed on as they are.

    Args:
        dataset: gives (image tensor, label) pairs; see :func:`fusion.data.labels_of` for where
            its labels are found.

    Raises:
        UserError: it has no length, or its labels are not whole numbers.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        labels = labels_of(dataset)
        names = class_names_of(dataset)
        classes = int(labels.max()) + 1 if names is None else len(names)
        mean, std = _statistics(dataset, "mean"), _statistics(dataset, "std")
        known = mean is not None and std is not None
        super().__init__(
            labels,
            class_names=names,
            original_labels=original_labels_of(dataset, classes),
            mean=mean if known else None,
            std=std if known else None,
        )
        self.dataset = dataset

    def __repr__(self) -> str:
        return f"{type(self.dataset).__name__}({len(self)} images, {self.num_classes} classes)"

    @property
    def augments(self) -> bool:
        """Whether the data set can return augmented images; see :func:`can_augment`."""
        return can_augment(self.dataset)

    @property
    def in_memory(self) -> bool:
        """Whether the data set is known to hold tensors."""
        return holds_tensors(self.dataset)

    def pixels(self, index: int, *, augment: bool = False) -> Tensor:
        """Return one image; in 0..1 where the data set states its normalisation."""
        image, _ = read_pair(self.dataset, index, augment=augment)
        if self.mean is None or self.std is None:
            return image
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return image * std + mean


def as_labelled(dataset: Dataset[Any]) -> LabelledImages:
    """Return ``dataset`` itself if it is of this package, else as :class:`ForeignImages`."""
    return dataset if isinstance(dataset, LabelledImages) else ForeignImages(dataset)


def can_augment(dataset: Dataset[Any]) -> bool:
    """Return whether ``dataset`` gives augmented images when it is asked to.

    A foreign data set applies its own transform; an image set of this package needs an
    augmentation, also inside torch's ``Subset`` and ``ConcatDataset``.
    """
    if isinstance(dataset, LabelledImages):
        return dataset.augments
    if type(dataset) is Subset:
        return can_augment(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(can_augment(part) for part in dataset.datasets)
    return True


def holds_tensors(dataset: Dataset[Any]) -> bool:
    """Return whether reading an image of ``dataset`` is known to take no decoding."""
    if isinstance(dataset, LabelledImages):
        return dataset.in_memory
    if isinstance(dataset, Subset):
        return holds_tensors(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(holds_tensors(part) for part in dataset.datasets)
    return isinstance(dataset, TensorDataset)


def read_pair(dataset: Dataset[Any], index: int, *, augment: bool) -> tuple[Tensor, int]:
    """Return one normalised image, float32, and its label.

    Raises:
        UserError: an item is not a pair of a floating-point tensor and a whole number.
    """
    name = type(dataset).__name__
    pair = _item(dataset, index, augment)
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise UserError(
            f"dataset: {name} gives a {_kind(pair)} at index {index}; give a data set of "
            f"(image, label) pairs"
        )
    image, label = pair
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise UserError(
            f"dataset: {name} gives an image of type {_kind(image)} at index {index}; give it a "
            f"transform that ends in a normalised floating-point tensor"
        )
    try:
        return image.to(torch.float32), operator.index(label)
    except TypeError as error:
        raise UserError(
            f"dataset: {name} gives a label of type {_kind(label)} at index {index}; labels are "
            f"whole numbers"
        ) from error


def _item(dataset: Dataset[Any], index: int, augment: bool) -> Any:
    """Return ``dataset[index]``, augmented through torch's ``Subset`` and ``ConcatDataset``."""
    if isinstance(dataset, LabelledImages):
        image = dataset.normalise(dataset.pixels(index, augment=augment))
        return image, int(dataset.labels[index])
    if type(dataset) is Subset:
        return _item(dataset.dataset, dataset.indices[index], augment)
    if type(dataset) is ConcatDataset:
        part = bisect.bisect_right(dataset.cumulative_sizes, index)
        start = dataset.cumulative_sizes[part - 1] if part else 0
        return _item(dataset.datasets[part], index - start, augment)
    return dataset[index]


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)
    length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{type(value).__name__}{length}"


def _statistics(dataset: Dataset[Any], name: str) -> tuple[float, ...] | None:
    if isinstance(dataset, Subset):
        return _statistics(dataset.dataset, name)
    if isinstance(dataset, ConcatDataset):
        found = {_statistics(part, name) for part in dataset.datasets}
        return found.pop() if len(found) == 1 else None
    values = getattr(dataset, name, None)
    if isinstance(values, Tensor | np.ndarray):
        values = values.ravel().tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    numbers = all(isinstance(value, float | int) for value in values)
    return tuple(float(value) for value in values) if numbers else None
