"""Labels and class names of any data set, where possible without reading its images."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from tqdm import tqdm

from fusion.data.randomness import own_random_numbers
from fusion.data.seeds import seed_from
from fusion.errors import UserError
from fusion.labels import LabelSpace

log = logging.getLogger(__name__)

# Where torchvision's data sets and their like keep their labels, and where they keep pairs of a
# file and its label.
_LABELS = ("labels", "targets", "_labels")
_SAMPLES = ("samples", "imgs", "_samples")


def check_map_style(dataset: Dataset[Any]) -> int:
    """Return the length of ``dataset``.

    Raises:
        UserError: it has none, or it is 0.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise UserError(
            f"dataset: a {type(dataset).__name__} has no length; give a map-style data set, "
            f"which has __len__ and __getitem__"
        )
    if not len(dataset):
        raise UserError(f"dataset: the {type(dataset).__name__} is empty")
    return len(dataset)


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """Return the labels (N,) int64 of a map-style data set, on the CPU.

    They are looked up in ``labels``, ``targets`` or ``_labels``, in the pairs of ``samples``,
    ``imgs`` or ``_samples``, and in the parts of torch's ``Subset`` and ``ConcatDataset``; a
    ``target_transform`` is applied. A data set that has none of these is read once.

    Raises:
        UserError: no length, or labels that are not one whole number per image.
    """
    length = check_map_style(dataset)
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return _as_labels(dataset, dataset.tensors[1], length)
    found = _stated_labels(dataset)
    if found is None:
        log.info("%s: reading all %d images for their labels", type(dataset).__name__, length)
        items: Any = dataset
        with own_random_numbers():
            indices = tqdm(range(length), desc="reading labels", unit="img", disable=None)
            found = [items[index][1] for index in indices]
    elif (transform := getattr(dataset, "target_transform", None)) is not None:
        found = [transform(label) for label in _as_labels(dataset, found, length).tolist()]
    return _as_labels(dataset, found, length)


def class_names_of(dataset: Dataset[Any]) -> tuple[str, ...] | None:
    """Return the names of the classes by label: ``class_names``, else ``classes``, else None.

    ImageNet's classes have several names each; they are joined by a comma.
    """
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        names = {class_names_of(part) for part in dataset.datasets}
        return names.pop() if len(names) == 1 else None
    for attribute in ("class_names", "classes"):
        found = getattr(dataset, attribute, None)
        if isinstance(found, Sequence) and not isinstance(found, str) and len(found):
            return tuple(n if isinstance(n, str) else ", ".join(map(str, n)) for n in found)
    return None


def label_space(dataset: Any) -> LabelSpace | None:
    """Return the classes that a data set states, or ``None`` where it states none.

    Read are ``class_names`` and ``original_labels``, or torchvision's ``classes``; torch's
    ``Subset`` and ``ConcatDataset`` are looked through.
    """
    names = class_names_of(dataset)
    if names is not None:
        return LabelSpace(original_labels_of(dataset, len(names)), names)
    labels = getattr(dataset, "original_labels", None)
    return None if labels is None else LabelSpace(tuple(labels))


def new_labels(class_names: Sequence[str]) -> tuple[int, ...]:
    """Return original labels for derived classes, such as groups of other classes.

    They are consecutive numbers, far from those of any real data set: where names are unknown,
    classes are distinguished by number, and those of two tasks must not coincide by chance.
    """
    start = seed_from("classes", *class_names) // 2  # room for the numbers after it
    return tuple(range(start, start + len(class_names)))


def original_labels_of(dataset: Dataset[Any], classes: int) -> tuple[int, ...]:
    """Return ``original_labels`` of ``dataset`` if it has them, else 0 to ``classes`` - 1."""
    if isinstance(dataset, Subset):
        return original_labels_of(dataset.dataset, classes)
    found = getattr(dataset, "original_labels", None)
    return tuple(range(classes)) if found is None else tuple(int(label) for label in found)


def _stated_labels(dataset: Dataset[Any]) -> Any | None:
    for attribute in _LABELS:
        found = getattr(dataset, attribute, None)
        if isinstance(found, Tensor | np.ndarray | Sequence) and not isinstance(found, str):
            return found
    for attribute in _SAMPLES:
        found = getattr(dataset, attribute, None)
        if isinstance(found, Sequence) and all(
            isinstance(pair, Sequence) and len(pair) == 2 for pair in found
        ):
            return [label for _, label in found]
    return None


def _as_labels(dataset: Dataset[Any], found: Any, length: int) -> Tensor:
    name = type(dataset).__name__
    try:
        labels = torch.as_tensor(found).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"dataset: the labels of {name} are not whole numbers ({error})") from error
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise UserError(
            f"dataset: the labels of {name} are {str(labels.dtype).removeprefix('torch.')} of "
            f"shape {tuple(labels.shape)}; give one whole number per image"
        )
    if len(labels) != length:
        raise UserError(f"dataset: {name} states {len(labels)} labels for {length} images")
    return labels.to(torch.int64)
