"""A labelled image set held in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.data.augmentation import Augmentation
from fusion.data.labelled_images import RGB_MEAN, RGB_STD, LabelledImages
from fusion.errors import UserError


class ImageTensors(LabelledImages):
    """Images (N, C, H, W) and labels (N,), with class names, normalisation and augmentation.

    Indexing gives ``(image, label)``, the image float32 and normalised; training reads whole
    batches through :func:`fusion.data.batches` instead, which normalises on the device.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or floating point in 0..1; stored unchanged.
        labels: (N,) whole numbers in 0..K-1.
        class_names: the K names, by label.
        original_labels: for each label, the label of that class in the full data set that this
            one is a part of; the labels themselves by default.
        mean: of each channel, on the scale 0..1, subtracted by normalisation.
        std: of each channel, on the scale 0..1, divided by afterwards.
        augmentation: applied to a training batch when augmentation is requested.

    Raises:
        UserError: shapes, types, labels or statistics do not fit together.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        class_names: Sequence[str],
        original_labels: Sequence[int] | None = None,
        mean: Sequence[float] = RGB_MEAN,
        std: Sequence[float] = RGB_STD,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images = images
        super().__init__(
            labels,
            class_names=class_names,
            original_labels=range(len(class_names)) if original_labels is None else original_labels,
            mean=mean,
            std=std,
            augmentation=augmentation,
        )
        self._check_images()

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return f"{type(self).__name__}({len(self)} images {shape}, {self.num_classes} classes)"

    @property
    def in_memory(self) -> bool:
        """True: the pixels are in one tensor."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the stored pixels."""
        return self.images.nbytes

    def pixels(self, index: int, *, augment: bool = False) -> Tensor:
        """Return one image (C, H, W) as it is stored; see :class:`LabelledImages`."""
        if not augment or self.augmentation is None:
            return self.images[index]
        return self.augmentation.of_one(self.images[index])

    def select(self, indices: Tensor) -> ImageTensors:
        """Return the images at ``indices``, with the same classes."""
        indices = indices.to(self.images.device)
        return self._with(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> ImageTensors:
        """Return this set on ``device``; itself if it is there already."""
        if torch.empty(0, device=device).device == self.images.device:
            return self
        return self._with(self.images.to(device), self.labels.to(device))

    def _with(self, images: Tensor, labels: Tensor) -> ImageTensors:
        return ImageTensors(
            images,
            labels,
            class_names=self.class_names,
            original_labels=self.original_labels,
            mean=self.mean,
            std=self.std,
            augmentation=self.augmentation,
        )

    def _check_images(self) -> None:
        if self.images.ndim != 4 or 0 in self.images.shape:
            raise UserError(
                f"images: the shape is {tuple(self.images.shape)}; give at least one image as "
                f"(images, channels, height, width)"
            )
        if self.images.dtype != torch.uint8 and not self.images.is_floating_point():
            raise UserError(
                f"images: the type is {self.images.dtype}; give uint8 in 0..255 or floating point"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"labels: the shape is {tuple(self.labels.shape)} for {len(self.images)} images; "
                f"give one label per image"
            )
        self._check_channels(self.images.shape[1])
