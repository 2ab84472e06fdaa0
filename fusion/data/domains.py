"""Domain shifts with the same labels: images rotated, inverted, blurred, noisy, faded or grey.

Each function takes any image set. For :class:`~fusion.data.ImageTensors` it returns
``ImageTensors`` at once; for other sets it returns a view that changes each image when it is read.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.foreign_images import as_labelled
from fusion.data.labelled_images import LabelledImages
from fusion.data.seeds import seed_from
from fusion.data.view import changed, with_known_pixels
from fusion.errors import UserError
from fusion.options import Fraction, Positive, Seed, checked

# ITU-R BT.601: how bright red, green and blue look.
_LUMINANCE = (0.299, 0.587, 0.114)


@checked
def rotated(dataset: Dataset[Any], turns: Literal[1, 2, 3]) -> LabelledImages:
    """Return the images turned counter-clockwise by ``turns`` quarter turns.

    Raises:
        UserError: ``turns`` is not 1, 2 or 3.
    """
    return changed(as_labelled(dataset), partial(_turned, turns=turns))


@checked
def inverted(dataset: Dataset[Any]) -> LabelledImages:
    """Return the images with black and white exchanged: 1 - x of each pixel x in 0..1.

    Raises:
        UserError: the data set normalises its images and does not state how.
    """
    return changed(with_known_pixels(dataset, "inverted"), _inverted)


@checked
def blurred(dataset: Dataset[Any], sigma: Positive) -> LabelledImages:
    """Return the images blurred by a Gaussian that reaches to three deviations.

    Args:
        dataset: the images.
        sigma: standard deviation of the Gaussian in pixels.

    Raises:
        UserError: ``sigma`` is not above 0; while reading, it is too large for the images, which
            are mirrored at their borders and must be larger than three deviations.
    """
    return changed(as_labelled(dataset), partial(_blurred, sigma=sigma))


@checked
def noisy(dataset: Dataset[Any], deviation: Positive, *, seed: Seed = 0) -> LabelledImages:
    """Return the images with Gaussian noise, the same at every reading.

    Args:
        dataset: the images.
        deviation: standard deviation of the noise, on the scale 0..1 of the pixels, which are
            clipped to that scale afterwards.
        seed: of the noise, which depends on it and on the number of the image.

    Raises:
        UserError: ``deviation`` is not above 0, or the data set normalises its images and does
            not state how.
    """
    images = with_known_pixels(dataset, "noisy")
    return changed(images, partial(_noisy, deviation=deviation, seed=seed))


@checked
def faded(dataset: Dataset[Any], contrast: Fraction) -> LabelledImages:
    """Return the images with less contrast: 1/2 + contrast · (x - 1/2) of each pixel x in 0..1.

    Args:
        dataset: the images.
        contrast: remaining share of the contrast, in (0, 1].

    Raises:
        UserError: ``contrast`` is out of range, or the data set normalises its images and does
            not state how.
    """
    return changed(with_known_pixels(dataset, "faded"), partial(_faded, contrast=contrast))


@checked
def greyed(dataset: Dataset[Any]) -> LabelledImages:
    """Return colour images without colour: their luminance (ITU-R BT.601) in all three channels.

    Raises:
        UserError: the data set normalises its images and does not state how, or is not RGB.
    """
    images = with_known_pixels(dataset, "greyed")
    if images.mean is not None and len(images.mean) != len(_LUMINANCE):
        raise UserError(f"greyed: {images!r} has {len(images.mean)} channels; give an RGB set")
    return changed(images, _greyed)


def _turned(pixels: Tensor, _: Tensor, *, turns: int) -> Tensor:
    return torch.rot90(pixels, turns, (-2, -1))


def _inverted(pixels: Tensor, _: Tensor) -> Tensor:
    return 1 - pixels


def _faded(pixels: Tensor, _: Tensor, *, contrast: float) -> Tensor:
    return (pixels - 0.5) * contrast + 0.5


def _blurred(pixels: Tensor, _: Tensor, *, sigma: float) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    reach = math.ceil(3 * sigma)
    if reach >= min(pixels.shape[-2:]):
        raise UserError(
            f"sigma: {sigma} pixels reach {reach} pixels far, the images have "
            f"{pixels.shape[-2]}x{pixels.shape[-1]}; give a smaller sigma"
        )
    blurred: Tensor = gaussian_blur(pixels, [2 * reach + 1] * 2, [sigma] * 2)
    return blurred


def _noisy(pixels: Tensor, numbers: Tensor, *, deviation: float, seed: int) -> Tensor:
    generator = torch.Generator()
    noise = torch.empty(pixels.shape)
    for row, number in zip(noise, numbers.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(seed_from(seed, "noise", number)))
    return pixels.add(noise.to(pixels), alpha=deviation).clamp_(0, 1)


def _greyed(pixels: Tensor, _: Tensor) -> Tensor:
    weights = torch.tensor(_LUMINANCE).view(3, 1, 1).to(pixels)
    return (pixels * weights).sum(-3, keepdim=True).expand_as(pixels)
