"""A labelled image set whose files are decoded on access."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusion.data.augmentation import Augmentation
from fusion.data.decoding import Decoding, FileTransform
from fusion.data.labelled_images import RGB_MEAN, RGB_STD, LabelledImages
from fusion.data.view import part
from fusion.errors import UserError

# Floating-point pixels outside of this range are normalised, not overshoot of a bicubic filter.
_PIXEL_RANGE = (-0.5, 1.5)


class ImageFiles(LabelledImages):
    """Image files and their labels; only names and labels are in memory.

    :func:`fusion.data.batches` decodes them in worker processes.

    Args:
        root: folder that the file names start from.
        files: N names relative to ``root``.
        labels: (N,) whole numbers in 0..K-1.
        class_names: the K names, by label.
        original_labels: for each label, the label of that class in the full data set that this
            one is a part of; the labels themselves by default.
        decoding: options of decoding a file.
        mean: of each channel, on the scale 0..1, subtracted by normalisation.
        std: of each channel, on the scale 0..1, divided by afterwards.
        augmentation: an :class:`Augmentation` of the decoded pixels, or a transform that takes
            the whole upright image as Pillow's ``Image`` and returns one or a tensor, uint8 or in
            0..1: ``torchvision.transforms.v2`` without ``Normalize``, which comes afterwards from
            ``mean`` and ``std``. Its sizes replace those of ``decoding``.

    Raises:
        UserError: files, labels, names or statistics do not fit together.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        root: str | Path,
        files: Sequence[str],
        labels: Tensor,
        *,
        class_names: Sequence[str],
        original_labels: Sequence[int] | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        mean: Sequence[float] = RGB_MEAN,
        std: Sequence[float] = RGB_STD,
        augmentation: Augmentation | FileTransform | None = None,
    ) -> None:
        super().__init__(
            labels,
            class_names=class_names,
            original_labels=range(len(class_names)) if original_labels is None else original_labels,
            mean=mean,
            std=std,
            augmentation=augmentation,
        )
        if not files or self.labels.shape != (len(files),):
            raise UserError(
                f"labels: the shape is {tuple(self.labels.shape)} for {len(files)} files; give at "
                f"least one file, and one label per file"
            )
        self._check_channels(decoding.channels)
        self.root = Path(root)
        self.decoding = decoding
        # One array instead of many strings: worker processes share its memory, while counting
        # the references to strings would copy theirs.
        self._files = np.array([os.fsencode(name) for name in files])

    def __repr__(self) -> str:
        size = self.decoding.image_size
        shape = f" {self.decoding.channels}x{size}x{size}" if size is not None else ""
        return f"{type(self).__name__}({len(self)} images{shape}, {self.num_classes} classes)"

    def path(self, index: int) -> Path:
        """Return where the image at ``index`` is."""
        return self.root / os.fsdecode(self._files[index])

    def pixels(self, index: int, *, augment: bool = False) -> Tensor:
        """Return one decoded image (C, H, W); see :class:`LabelledImages`.

        Raises:
            UserError: the file cannot be read, or the augmentation does not return an image.
        """
        path = self.path(index)
        if augment and self.augmentation is not None:
            if not isinstance(self.augmentation, Augmentation):
                image = self.augmentation(self.decoding.open(path))
                return _checked(_as_tensor(image), self.decoding.channels)
            return self.augmentation.of_one(self.pixels(index))
        return torch.from_numpy(self.decoding.read(path)).permute(2, 0, 1)

    def select(self, indices: Tensor) -> LabelledImages:
        """Return the images at ``indices``, with the same classes."""
        labels = self.labels[indices.cpu()]
        return part(self, indices, labels, self.class_names, self.original_labels)


def _as_tensor(image: object) -> Tensor:
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    if isinstance(image, Tensor):
        return image.as_subclass(Tensor)
    raise UserError(
        f"augmentation: it gives a {type(image).__name__}; end it in an image or a tensor"
    )


def _checked(image: Tensor, channels: int) -> Tensor:
    if image.ndim != 3 or image.shape[0] != channels:
        raise UserError(
            f"augmentation: it gives images of shape {tuple(image.shape)}; the data set has "
            f"{channels} channels, (channels, height, width)"
        )
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise UserError(f"augmentation: it gives {image.dtype}; give uint8, or floats in 0..1")
    low, high = (float(value) for value in image.aminmax())
    if low < _PIXEL_RANGE[0] or high > _PIXEL_RANGE[1]:
        raise UserError(
            f"augmentation: it gives values from {low:.2g} to {high:.2g}; leave out its "
            f"normalisation, which comes afterwards from mean and std"
        )
    return image
