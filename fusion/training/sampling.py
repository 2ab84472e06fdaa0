"""Random samples of images to measure a network on, and checks of their size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data import batches, seed_from
from fusion.errors import UserError

Images = Dataset[Any] | Mapping[str, Dataset[Any]]
"""A data set, or several by name, of which samples are drawn equally."""


def check_sample_size(images: int, batch_size: int) -> None:
    """Check that a sample and its batches can have a variance.

    Raises:
        UserError: one of them is below 2.
    """
    for option, value in (("images", images), ("batch_size", batch_size)):
        if value < 2:
            raise UserError(f"{option}: {value} was given; a variance takes 2 images or more")


def check_enough_images(data: Images, what: str) -> None:
    """Check that ``data``, where its length is known, has two images to ``what`` on.

    Raises:
        UserError: it has fewer.
    """
    parts = list(data.values()) if isinstance(data, Mapping) else [data]
    if all(isinstance(part, Sized) for part in parts) and sum(map(len, parts)) < 2:  # type: ignore[arg-type]
        raise UserError(f"dataset: one image has no variance; {what} on 2 images or more")


def sample_images(
    data: Images,
    *,
    images: int,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield batches of images drawn at random, without their labels.

    The same number of images is drawn from each of several data sets, and every batch holds some of
    each. Where their images differ in size, each batch is yielded in parts of one size.

    Args:
        data: where they are drawn from: a data set, or name → data set.
        images: how many, at most.
        batch_size: of each batch; the last may be smaller.
        seed: seed of the draw; each of several data sets has a separate seed, derived from its
            name.
        device: device of the yielded images.
    """
    if not isinstance(data, Mapping):
        for pictures, _ in batches(
            data, batch_size=batch_size, device=device, shuffle=True, seed=seed, limit=images
        ):
            yield pictures
        return
    parts = [
        sample_images(
            part,
            images=max(1, images // len(data)),
            batch_size=max(1, batch_size // len(data)),
            seed=seed_from(seed, name),
            device=device,
        )
        for name, part in data.items()
    ]
    for drawn in itertools.zip_longest(*parts):
        present = [batch for batch in drawn if batch is not None]
        for size in dict.fromkeys(batch.shape[1:] for batch in present):
            yield torch.cat([batch for batch in present if batch.shape[1:] == size])
