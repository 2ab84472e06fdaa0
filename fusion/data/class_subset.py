"""Some classes of an image set, relabelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.foreign_images import as_labelled
from fusion.data.image_tensors import ImageTensors
from fusion.data.labelled_images import LabelledImages
from fusion.data.view import part
from fusion.errors import UserError
from fusion.options import Classes, checked


@overload
def ClassSubset(dataset: ImageTensors, classes: Sequence[int | str]) -> ImageTensors: ...
@overload
def ClassSubset(dataset: Dataset[Any], classes: Sequence[int | str]) -> LabelledImages: ...
@checked
def ClassSubset(dataset: Dataset[Any], classes: Classes) -> LabelledImages:  # noqa: N802
    """Return the images of some classes, relabelled 0…k-1 in the order given.

    ``original_labels`` of the result holds their labels in the full data set, through any number of
    subsets. The subset of :class:`ImageTensors` is :class:`ImageTensors`; that of any other
    map-style data set reads its images on access. (A function named like a class, as
    ``threading.Lock`` is: which class it makes depends on the data set.)

    Args:
        dataset: the set to choose from, see :func:`fusion.data.labels_of` for where its labels
            are found; it is not changed.
        classes: labels of ``dataset`` or names of its classes.

    Raises:
        UserError: a class is unknown, named twice, or has no images.
    """
    images = as_labelled(dataset)
    kept = [label_of(images, name) for name in classes]
    if len(set(kept)) != len(kept):
        raise UserError(f"classes: {list(classes)}; name classes, and each once")
    indices, labels = merge_labels(images, [[label] for label in kept])
    present = set(torch.unique(labels).tolist())
    missing = [class_name(images, old) for new, old in enumerate(kept) if new not in present]
    if missing:
        raise UserError(f"classes: {images!r} has no images of {missing}; leave them out")
    names = images.class_names
    return part(
        images,
        indices,
        labels,
        None if names is None else [names[label] for label in kept],
        [images.original_labels[label] for label in kept],
    )


def label_of(dataset: LabelledImages, name: int | str) -> int:
    """Return the label of a class given by its label or its name.

    Raises:
        UserError: there is no such class, or several have that name.
    """
    names = dataset.class_names or ()
    known: Sequence[int | str] = names if isinstance(name, str) else range(dataset.num_classes)
    if name not in known:
        raise UserError(
            f"classes: {name!r} is not a class of {dataset!r}; its labels are 0 to "
            f"{dataset.num_classes - 1}, its classes {', '.join(names) or 'have no names'}"
        )
    if known.count(name) > 1:
        raise UserError(f"classes: several classes of {dataset!r} are named {name!r}; give a label")
    return known.index(name)


def class_name(dataset: LabelledImages, label: int) -> str:
    """Return the name of a class, or its label as text where the set has no names."""
    return str(label) if dataset.class_names is None else dataset.class_names[label]


def merge_labels(dataset: LabelledImages, groups: Iterable[Iterable[int]]) -> tuple[Tensor, Tensor]:
    """Return the indices of the images whose label is in a group, and the number of that group."""
    table = torch.full((dataset.num_classes,), -1)
    for number, group in enumerate(groups):
        table[list(group)] = number
    labels = table[dataset.labels.cpu()]
    return torch.nonzero(labels >= 0).squeeze(1), labels[labels >= 0]
