"""Change the shape, channels or normalisation of images to what a network expects.

Each function takes any image set; for :class:`~fusion.data.ImageTensors` it returns
``ImageTensors``. For example, ``as_rgb(resized(digits("train"), 32))`` turns 8×8 grey digits into
inputs of a network for CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from fusion.data.foreign_images import as_labelled
from fusion.data.labelled_images import LabelledImages
from fusion.data.view import changed, last_augmentation, with_known_pixels
from fusion.errors import UserError
from fusion.options import Length, Pixels, checked

HeightAndWidth = Annotated[Sequence[Pixels], Length(exactly=2)]


@checked
def resized(dataset: Dataset[Any], size: Pixels | HeightAndWidth) -> LabelledImages:
    """Return the images scaled bilinearly, with a wider filter where they shrink (antialias).

    Args:
        dataset: the images.
        size: height and width in pixels, or one number for both; the aspect ratio is not kept.
            The padding of an :class:`Augmentation` grows in proportion to the height.

    Raises:
        UserError: a size below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    images = as_labelled(dataset)
    augmentation = last_augmentation(images)
    if augmentation is not None:
        share = height / images.pixels(0).shape[-2]
        augmentation = replace(augmentation, padding=round(augmentation.padding * share))
    return changed(images, partial(_resized, size=(height, width)), augmentation=augmentation)


@checked
def as_rgb(dataset: Dataset[Any]) -> LabelledImages:
    """Return grey images with their channel repeated three times; colour images unchanged.

    Raises:
        UserError: the images have neither one channel nor three.
    """
    images = as_labelled(dataset)
    channels = images[0][0].shape[0] if images.mean is None else len(images.mean)
    if channels == 3:
        return images
    if channels != 1:
        raise UserError(f"as_rgb: {images!r} has {channels} channels; give grey or RGB images")
    mean = None if images.mean is None else images.mean * 3
    std = None if images.std is None else images.std * 3
    return changed(images, _repeated, mean=mean, std=std)


@checked
def renormalised(
    dataset: Dataset[Any], *, mean: Sequence[float], std: Sequence[float]
) -> LabelledImages:
    """Return the same pixels under another normalisation.

    Args:
        dataset: the images.
        mean: of each channel, on the scale 0..1.
        std: of each channel, on the scale 0..1.

    Raises:
        UserError: the data set normalises its images and does not state how, or the numbers do
            not fit its channels.
    """
    images = with_known_pixels(dataset, "renormalised")
    channels = len(images.mean or ())
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"renormalised: {len(mean)} and {len(std)} numbers for images of {channels} channels; "
            f"give mean and std one number per channel"
        )
    return changed(images, None, mean=mean, std=std)


def _resized(pixels: Tensor, _: Tensor, *, size: tuple[int, int]) -> Tensor:
    scaled = F.interpolate(
        pixels.to(torch.float32), size, mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.to(pixels.dtype)


def _repeated(pixels: Tensor, _: Tensor) -> Tensor:
    return pixels.expand(-1, 3, -1, -1)
