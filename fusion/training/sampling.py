"""A random sample of images to measure a network on, and what is too little for a variance."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data import batches
from fusion.errors import UserError


def check_sample_size(images: int, batch_size: int) -> None:
    """Check that a sample and its batches can have a variance.

    Raises:
        UserError: one of them is below 2.
    """
    for option, value in (("images", images), ("batch_size", batch_size)):
        if value < 2:
            raise UserError(f"{option}: {value} was asked for; a variance takes 2 images or more")


def check_enough_images(dataset: Dataset[Any], what: str) -> None:
    """Check that ``dataset``, where it knows its length, has two images to ``what`` on.

    Raises:
        UserError: it has fewer.
    """
    if isinstance(dataset, Sized) and len(dataset) < 2:
        raise UserError(f"dataset: one image has no variance; {what} on 2 images or more")


def sample_images(
    dataset: Dataset[Any],
    *,
    images: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield batches of images drawn at random, without their labels.

    Args:
        dataset: where they are drawn from.
        images: how many, at most.
        batch_size: of each batch; the last may be smaller.
        seed: of the draw.
        device: where they are wanted.
    """
    for pictures, _ in batches(
        dataset, batch_size=batch_size, device=device, shuffle=True, seed=seed, limit=images
    ):
        yield pictures
