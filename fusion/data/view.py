"""Views of images of other sets, with new labels and through a function of their pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.augmentation import Augmentation
from fusion.data.foreign_images import as_labelled
from fusion.data.image_tensors import ImageTensors
from fusion.data.labelled_images import LabelledImages
from fusion.data.labels import new_labels
from fusion.errors import UserError

# Changes pixels (N, C, H, W) in 0..1, given their numbers (N,) in the set that is viewed.
Kernel = Callable[[Tensor, Tensor], Tensor]

_CHUNK = 1024  # images in memory changed at once, which bounds the memory of their float32 copies


class ImageView(LabelledImages):
    """Selected images of one or several sets, read from there on access.

    Subsets, draws, joined sets and changed domains are views where the images are not in one
    tensor.

    Args:
        sources: the sets that are viewed; they share channels and normalisation.
        rows: (N, 2) int64, for each image the number of its source and its index there.
        labels: (N,) of the images.
        class_names: by label, or None where they are unknown.
        original_labels: by label.
        mean: for normalisation, None if the sources give normalised images.
        std: the same for the standard deviation.
        augmentation: applied after ``kernel``; None leaves augmentation to the sources, whose
            transforms come before it.
        kernel: function of the pixels; uint8 pixels are rounded to uint8 again.

    Raises:
        UserError: labels, names or statistics do not fit together.
    """

    augmentation: Augmentation | None

    def __init__(
        self,
        sources: Sequence[LabelledImages],
        rows: Tensor,
        labels: Tensor,
        *,
        class_names: Sequence[str] | None,
        original_labels: Sequence[int],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augmentation: Augmentation | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(
            labels,
            class_names=class_names,
            original_labels=original_labels,
            mean=mean,
            std=std,
            augmentation=augmentation,
        )
        self.sources = tuple(sources)
        self.rows = rows
        self.kernel = kernel

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} images, {self.num_classes} classes, of "
            f"{', '.join(map(repr, self.sources))})"
        )

    @property
    def augments(self) -> bool:
        """Whether this view or all of its sources can augment."""
        return self.augmentation is not None or all(source.augments for source in self.sources)

    @property
    def in_memory(self) -> bool:
        """Whether all of its sources are in memory."""
        return all(source.in_memory for source in self.sources)

    def pixels(self, index: int, *, augment: bool = False) -> Tensor:
        """Return one image (C, H, W) as its source stores it, changed by the kernel."""
        source, row = self.rows[index].tolist()
        last = self.augmentation if augment else None
        image = self.sources[source].pixels(row, augment=augment and last is None)
        if self.kernel is not None:
            number = torch.tensor([index % len(self)])
            image = _change(self.kernel, image[None], number)[0]
        return image if last is None else last.of_one(image)

    def select(self, indices: Tensor) -> LabelledImages:
        """Return the images at ``indices``, with the same classes."""
        return part(
            self, indices, self.labels[indices.cpu()], self.class_names, self.original_labels
        )


def part(
    dataset: LabelledImages,
    indices: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None,
    original_labels: Sequence[int],
) -> LabelledImages:
    """Return the images at ``indices`` under ``labels``: in memory if ``dataset`` is, else a view.

    Views of views are flattened, so that any number of subsets costs one look-up per image.
    """
    if isinstance(dataset, ImageTensors):
        indices = indices.to(dataset.images.device)
        return ImageTensors(
            dataset.images[indices],
            labels.to(dataset.images.device),
            class_names=class_names or dataset.class_names,
            original_labels=original_labels,
            mean=dataset.mean,
            std=dataset.std,
            augmentation=dataset.augmentation,
        )
    indices = indices.cpu()
    if isinstance(dataset, ImageView) and dataset.kernel is None:
        sources, rows = dataset.sources, dataset.rows[indices]
    else:
        sources, rows = (dataset,), rows_of(0, indices)
    return ImageView(
        sources,
        rows,
        labels.cpu(),
        class_names=class_names,
        original_labels=original_labels,
        mean=dataset.mean,
        std=dataset.std,
        augmentation=last_augmentation(dataset),
    )


def changed(
    dataset: LabelledImages,
    kernel: Kernel | None,
    *,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augmentation: Augmentation | None = None,
) -> LabelledImages:
    """Return all images of ``dataset`` transformed by ``kernel``, at once if they are in memory.

    Args:
        dataset: the images; options not given below are taken from it.
        kernel: function of the pixels.
        labels: new labels (N,), which ``class_names`` names.
        class_names: names of the new labels.
        mean: new mean for normalisation.
        std: new standard deviation for normalisation.
        augmentation: instead of the set's own :class:`Augmentation`.
    """
    names = dataset.class_names if class_names is None else class_names
    originals = dataset.original_labels if class_names is None else new_labels(class_names)
    labels = dataset.labels if labels is None else labels
    augmentation = augmentation or last_augmentation(dataset)
    if isinstance(dataset, ImageTensors):
        return ImageTensors(
            dataset.images if kernel is None else _change_all(kernel, dataset.images),
            labels.to(dataset.images.device),
            class_names=dataset.class_names if names is None else names,
            original_labels=originals,
            mean=mean or dataset.mean,
            std=std or dataset.std,
            augmentation=augmentation,
        )
    return ImageView(
        (dataset,),
        rows_of(0, torch.arange(len(dataset))),
        labels.cpu(),
        class_names=names,
        original_labels=originals,
        mean=mean or dataset.mean,
        std=std or dataset.std,
        augmentation=augmentation,
        kernel=kernel,
    )


def rows_of(source: int, indices: Tensor) -> Tensor:
    """Return rows (N, 2) of :class:`ImageView` for ``indices`` (N,) into one source."""
    return torch.stack([torch.full_like(indices, source), indices], dim=1)


def last_augmentation(dataset: LabelledImages) -> Augmentation | None:
    """Return the set's augmentation if it works on pixels, so that it can follow a kernel."""
    return dataset.augmentation if isinstance(dataset.augmentation, Augmentation) else None


def with_known_pixels(dataset: Dataset[Any], view: str) -> LabelledImages:
    """Return ``dataset`` as labelled images whose pixels are on the scale 0..1.

    Raises:
        UserError: it normalises its images and does not state how.
    """
    images = as_labelled(dataset)
    if images.mean is None:
        raise UserError(
            f"{view}: {images!r} does not state how it normalises its images; give the data set "
            f"attributes mean and std (0 and 1 per channel where it does not normalise)"
        )
    return images


def _change(kernel: Kernel, images: Tensor, numbers: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        return kernel(images, numbers)
    pixels = kernel(images.to(torch.float32).div_(255), numbers)
    return pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _change_all(kernel: Kernel, images: Tensor) -> Tensor:
    numbers = torch.split(torch.arange(len(images)), _CHUNK)
    pieces = zip(torch.split(images, _CHUNK), numbers, strict=True)
    return torch.cat([_change(kernel, piece, number) for piece, number in pieces])
