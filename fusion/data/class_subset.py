"""Some classes of an image set, relabelled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusion.data.image_tensors import ImageTensors
from fusion.errors import UserError


class ClassSubset(ImageTensors):
    """The images of some classes, relabelled 0…k-1 in the order given.

    ``original_labels`` remembers which classes of the full data set they are, through any
    number of subsets.

    Args:
        dataset: the set to choose from; it is not changed.
        classes: labels of ``dataset`` or names of its classes.

    Raises:
        UserError: a class is unknown, named twice, or has no images.
    """

    def __init__(self, dataset: ImageTensors, classes: Sequence[int | str]) -> None:
        if not isinstance(dataset, ImageTensors):
            raise UserError(
                f"dataset: a class subset is taken from ImageTensors, not from "
                f"{type(dataset).__name__}; load it with digits, cifar10 or image_folder"
            )
        kept = [_label(dataset, name) for name in classes]
        if not kept or len(set(kept)) != len(kept):
            raise UserError(f"classes: {list(classes)}; name at least one class, and each once")
        new_label = torch.full((dataset.num_classes,), -1)
        new_label[kept] = torch.arange(len(kept))
        labels = new_label[dataset.labels.cpu()].to(dataset.images.device)
        present = set(torch.unique(labels).tolist())
        missing = [dataset.class_names[old] for new, old in enumerate(kept) if new not in present]
        if missing:
            raise UserError(f"classes: {dataset} has no images of {missing}; leave them out")
        super().__init__(
            dataset.images[labels >= 0],
            labels[labels >= 0],
            class_names=[dataset.class_names[label] for label in kept],
            original_labels=[dataset.original_labels[label] for label in kept],
            mean=dataset.mean,
            std=dataset.std,
            augmentation=dataset.augmentation,
        )


def _label(dataset: ImageTensors, name: int | str) -> int:
    known: Sequence[int | str] = (
        dataset.class_names if isinstance(name, str) else range(dataset.num_classes)
    )
    if name not in known:
        raise UserError(
            f"classes: {name!r} is not a class of {dataset}; its labels are 0 to "
            f"{dataset.num_classes - 1}, its classes {', '.join(dataset.class_names)}"
        )
    return known.index(name)
