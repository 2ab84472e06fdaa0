"""A labelled image set that lives in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.augmentation import Augmentation
from fusion.errors import UserError

# ImageNet's channel means and deviations: what torchvision's models and most published weights,
# those of CIFAR ResNets included, were trained with.
RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """Images (N, C, H, W) and labels (N,), with all that is needed to feed and to name them.

    Indexing gives ``(image, label)``, the image float32 and normalised; training reads whole
    batches through :func:`fusion.data.batches` instead, which normalises on the device.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or floating point in 0..1; kept as it is.
        labels: (N,) whole numbers in 0..K-1.
        class_names: the K names, by label.
        original_labels: for each label, the label of that class in the full data set that this
            one is a part of; the labels themselves by default.
        mean: of each channel, on the scale 0..1, subtracted by normalisation.
        std: of each channel, on the scale 0..1, divided by afterwards.
        augmentation: what a training batch undergoes when augmentation is asked for.

    Raises:
        UserError: shapes, types, labels or statistics do not fit together.
    """

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
        originals = range(len(class_names)) if original_labels is None else original_labels
        self.images = images
        self.labels = labels.to(torch.int64)
        self.class_names = tuple(class_names)
        self.original_labels = tuple(int(label) for label in originals)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.augmentation = augmentation
        self._check()
        # One multiplication and one addition normalise a batch, whatever the storage type.
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        std_column = torch.tensor(self.std).view(-1, 1, 1)
        self._factor = (1 / (scale * std_column)).to(images.device)
        self._offset = (-torch.tensor(self.mean).view(-1, 1, 1) / std_column).to(images.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.images[index]), int(self.labels[index])

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return f"{type(self).__name__}({len(self)} images {shape}, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        """How many classes there are: labels run from 0 to this number minus one."""
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored pixels."""
        return self.images.nbytes

    def normalise(self, images: Tensor) -> Tensor:
        """Return stored pixels (…, C, H, W) as float32, minus the mean and over the deviation."""
        factor, offset = self._factor.to(images.device), self._offset.to(images.device)
        return images.to(torch.float32).mul(factor).add_(offset)

    def select(self, indices: Tensor) -> ImageTensors:
        """Return the images at ``indices``, with the same classes."""
        indices = indices.to(self.images.device)
        return self._with(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> ImageTensors:
        """Return this set on ``device``: itself if it is there already."""
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

    def _check(self) -> None:
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
                f"give one label an image"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise UserError(
                f"labels: they run from {low} to {high}, but {len(self.class_names)} class names "
                f"were given; labels count from 0 and each has a name"
            )
        if len(self.original_labels) != len(self.class_names) or len(
            set(self.original_labels)
        ) != len(self.original_labels):
            raise UserError(
                f"original_labels: {self.original_labels} for {len(self.class_names)} classes; "
                f"give one different label a class"
            )
        channels = self.images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise UserError(
                    f"{name}: {len(values)} numbers for images of {channels} channels; give one "
                    f"number a channel"
                )
        if min(self.std) <= 0:
            raise UserError(f"std: {self.std} has a number that is not above zero")
