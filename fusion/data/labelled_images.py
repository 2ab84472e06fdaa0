"""Base class of the image sets: labels, names and normalised images, wherever the pixels are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.errors import UserError

if TYPE_CHECKING:
    from fusion.data.augmentation import Augmentation
    from fusion.data.decoding import FileTransform

# ImageNet's channel means and deviations: what torchvision's models and most published weights,
# those of CIFAR ResNets included, were trained with.
RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)

# Normalising is three passes over the pixels; in pieces of this many numbers (1 MiB of float32)
# the second and third find them in the processor's cache, which halves the time for photographs.
_CACHED_NUMBERS = 2**18


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Base of the image sets of this package.

    Indexing gives ``(image, label)``, the image float32 and normalised. A subclass provides
    :meth:`pixels` and :meth:`select`; :func:`fusion.data.batches` reads pixels, which are four
    times smaller than normalised images, and normalises them on the device.

    Args:
        labels: (N,) whole numbers in 0..K-1.
        class_names: the K names, by label, or None where they are unknown.
        original_labels: for each of the K labels, the label of that class in the full data set
            that this one is a part of.
        mean: of each channel, on the scale 0..1, subtracted by normalisation; None (as well as
            ``std``) where the images come normalised already.
        std: of each channel, on the scale 0..1, divided by afterwards.
        augmentation: applied to an image when augmentation is requested.

    Raises:
        UserError: labels, names or statistics do not fit together.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        class_names: Sequence[str] | None,
        original_labels: Sequence[int],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augmentation: Augmentation | FileTransform | None = None,
    ) -> None:
        self.labels = labels.to(torch.int64)
        self.class_names = None if class_names is None else tuple(class_names)
        self.original_labels = tuple(int(label) for label in original_labels)
        self.mean = None if mean is None else tuple(float(value) for value in mean)
        self.std = None if std is None else tuple(float(value) for value in std)
        self.augmentation = augmentation
        self._normalisation: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = {}
        self._check_labels()
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"std: {self.std} has a number that is not above zero")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.pixels(index)), int(self.labels[index])

    @property
    def num_classes(self) -> int:
        """Number of classes: labels run from 0 to this number minus one."""
        return len(self.original_labels)

    @property
    def augments(self) -> bool:
        """Whether :meth:`pixels` can return augmented images."""
        return self.augmentation is not None

    @property
    def in_memory(self) -> bool:
        """Whether reading an image takes no decoding."""
        return False

    def pixels(self, index: int, *, augment: bool = False) -> Tensor:
        """Return one image as it is stored: (C, H, W), uint8 or floating point in 0..1.

        Args:
            index: its number in this set.
            augment: apply the augmentation, drawing from the global random generators, which
                :func:`fusion.data.batches` seeds for each image.
        """
        raise NotImplementedError

    def select(self, indices: Tensor) -> LabelledImages:
        """Return the images at ``indices``, with the same classes."""
        raise NotImplementedError

    def normalise(self, images: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return stored pixels as float32, minus the mean and over the deviation.

        Args:
            images: (…, C, H, W) as they are stored.
            out: float32 tensor of the same shape, on the same device, that takes the result.
        """
        if out is None:
            out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        if self.mean is None:
            return out.copy_(images)
        factor, offset = self._columns(images.device, images.dtype == torch.uint8)
        rows = len(images)
        if images.device.type == "cpu" and images.ndim == 4:
            rows = max(1, _CACHED_NUMBERS // max(1, images[:1].numel()))
        for start in range(0, len(images), rows):
            piece = slice(start, start + rows)
            out[piece].copy_(images[piece]).mul_(factor).add_(offset)
        return out

    def _columns(self, device: torch.device, bytes_: bool) -> tuple[Tensor, Tensor]:
        """Return the factor and the summand of normalisation, (C, 1, 1) each.

        One multiplication and one addition normalise a batch, whatever the storage type.
        """
        assert self.mean is not None
        assert self.std is not None
        if (device, bytes_) not in self._normalisation:
            std = torch.tensor(self.std).view(-1, 1, 1)
            factor = (1 / ((255.0 if bytes_ else 1.0) * std)).to(device)
            offset = (-torch.tensor(self.mean).view(-1, 1, 1) / std).to(device)
            self._normalisation[device, bytes_] = factor, offset
        return self._normalisation[device, bytes_]

    def _check_labels(self) -> None:
        originals = self.original_labels
        if self.class_names is not None and len(self.class_names) != len(originals):
            raise UserError(
                f"original_labels: {originals} for {len(self.class_names)} classes; give a "
                f"different label per class"
            )
        if len(set(originals)) != len(originals):
            raise UserError(
                f"original_labels: {originals} has a label twice; give a different label per class"
            )
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(originals):
            raise UserError(
                f"labels: they run from {int(self.labels.min())} to {int(self.labels.max())}, but "
                f"{len(originals)} classes were given; labels count from 0 and each has a class"
            )

    def _check_channels(self, channels: int) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise UserError(
                    f"{name}: {len(values)} numbers for images of {channels} channels; give one "
                    f"number a channel"
                )
