"""Several parts of one image set joined again under its original labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusion.data.image_tensors import ImageTensors
from fusion.errors import UserError


def concat(datasets: Sequence[ImageTensors]) -> ImageTensors:
    """Join sets that are parts of one full data set, under its original labels.

    The result's classes are all that occur, in the order of their original labels; an image that
    several sets hold is held several times. Augmentation and normalisation are the first's.

    Raises:
        UserError: no set, or sets that differ in image shape, pixel type, normalisation, or in
            the name of an original label.
    """
    if not datasets:
        raise UserError("datasets: nothing was given to join; give at least one data set")
    first = datasets[0]
    names: dict[int, str] = {}
    for number, dataset in enumerate(datasets):
        for what, here, there in (
            ("images of shape", tuple(dataset.images.shape[1:]), tuple(first.images.shape[1:])),
            ("pixels of type", dataset.images.dtype, first.images.dtype),
            ("normalisation", (dataset.mean, dataset.std), (first.mean, first.std)),
        ):
            if here != there:
                raise UserError(
                    f"datasets: number {number} has {what} {here}, the first has {there}; sets "
                    f"that are joined must agree"
                )
        for original, name in zip(dataset.original_labels, dataset.class_names, strict=True):
            if names.setdefault(original, name) != name:
                raise UserError(
                    f"datasets: original label {original} is '{names[original]}' in one set and "
                    f"'{name}' in number {number}; join parts of one full data set"
                )
    originals = sorted(names)
    position = {original: label for label, original in enumerate(originals)}
    device = first.images.device
    labels = [
        torch.tensor([position[original] for original in dataset.original_labels])[
            dataset.labels.cpu()
        ]
        for dataset in datasets
    ]
    return ImageTensors(
        torch.cat([dataset.images.to(device) for dataset in datasets]),
        torch.cat(labels).to(device),
        class_names=[names[original] for original in originals],
        original_labels=originals,
        mean=first.mean,
        std=first.std,
        augmentation=first.augmentation,
    )
