"""Join several parts of one image set under its original labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.class_subset import class_name
from fusion.data.foreign_images import as_labelled
from fusion.data.image_tensors import ImageTensors
from fusion.data.labelled_images import LabelledImages
from fusion.data.view import ImageView, last_augmentation, rows_of
from fusion.errors import UserError
from fusion.options import NON_EMPTY, checked


@overload
def concat(datasets: Sequence[ImageTensors]) -> ImageTensors: ...
@overload
def concat(datasets: Sequence[Dataset[Any]]) -> LabelledImages: ...
@checked
def concat(datasets: Annotated[Sequence[Dataset[Any]], NON_EMPTY]) -> LabelledImages:
    """Join sets that are parts of one full data set, under its original labels.

    The result's classes are all that occur, in the order of their original labels; an image that
    several sets hold is held several times. Normalisation is the first's, and so is augmentation,
    except that streamed sets with custom transforms keep these. If all sets are
    :class:`ImageTensors`, so is the result; otherwise images are read on access.

    Raises:
        UserError: no set, or sets that differ in image shape, pixel type, normalisation, or in
            the name of an original label.
    """
    parts = [as_labelled(dataset) for dataset in datasets]
    first = parts[0]
    names = _names(parts)
    originals = sorted(names)
    position = {original: label for label, original in enumerate(originals)}
    labels = torch.cat([_joined_labels(part, position) for part in parts])
    class_names = None if first.class_names is None else [names[label] for label in originals]
    tensors = [part for part in parts if isinstance(part, ImageTensors)]
    if class_names is not None and len(tensors) == len(parts):
        device = tensors[0].images.device
        return ImageTensors(
            torch.cat([part.images.to(device) for part in tensors]),
            labels.to(device),
            class_names=class_names,
            original_labels=originals,
            mean=tensors[0].mean,
            std=tensors[0].std,
            augmentation=tensors[0].augmentation,
        )
    rows = [rows_of(number, torch.arange(len(part))) for number, part in enumerate(parts)]
    return ImageView(
        parts,
        torch.cat(rows),
        labels,
        class_names=class_names,
        original_labels=originals,
        mean=first.mean,
        std=first.std,
        augmentation=last_augmentation(first),
    )


def _names(parts: Sequence[LabelledImages]) -> dict[int, str]:
    """Return the name of each original label, after a check that the sets agree."""
    first = parts[0]
    names: dict[int, str] = {}
    for number, part in enumerate(parts):
        facts: list[tuple[str, Any, Any]] = [
            ("normalisation", (part.mean, part.std), (first.mean, first.std))
        ]
        if isinstance(part, ImageTensors) and isinstance(first, ImageTensors):
            shape, dtype = part.images.shape[1:], part.images.dtype
            facts.insert(0, ("pixels of type", dtype, first.images.dtype))
            facts.insert(0, ("images of shape", tuple(shape), tuple(first.images.shape[1:])))
        for what, here, there in facts:
            if here != there:
                raise UserError(
                    f"datasets: number {number} has {what} {here}, the first has {there}; sets "
                    f"that are joined must agree"
                )
        for label, original in enumerate(part.original_labels):
            name = class_name(part, label)
            if names.setdefault(original, name) != name:
                raise UserError(
                    f"datasets: original label {original} is '{names[original]}' in one set and "
                    f"'{name}' in number {number}; join parts of one full data set"
                )
    return names


def _joined_labels(part: LabelledImages, position: dict[int, int]) -> Tensor:
    return torch.tensor([position[original] for original in part.original_labels])[
        part.labels.cpu()
    ]
