"""Batches of images on the device: shuffled, augmented, divided among processes, all seeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.foreign_images import can_augment
from fusion.data.image_tensors import ImageTensors
from fusion.data.labels import check_map_style
from fusion.data.loading import loaded
from fusion.data.seeds import seed_from
from fusion.errors import UserError

# Sets up to this size are copied to the device whole; larger ones are copied batch by batch.
RESIDENT_BYTES = 2**30


def batches(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    shuffle: bool = False,
    seed: int = 0,
    augment: bool = False,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    workers: int | Literal["auto"] = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over ``dataset`` in batches of normalised images and their labels.

    Order and augmentation depend on ``seed`` alone: not on the device, on the number of
    processes and workers, or on torch's global generator. In a data set that is not
    :class:`ImageTensors` they do not depend on the batch size either: for each image the global
    generators of torch, Python and NumPy are seeded from ``seed`` and its index, and restored
    afterwards, so that any transform is repeatable.

    Args:
        dataset: :class:`ImageTensors`, or any map-style data set of (image, label) pairs whose
            images are tensors, normalised by the data set itself unless it is of this package.
        batch_size: images per batch, counted over all processes: with four processes, a batch of
            128 is 32 images in each.
        device: device of the yielded batches.
        shuffle: random order; otherwise the order of the data set.
        seed: seed of order and augmentation; pass a different one for each epoch.
        augment: apply the data set's own augmentation. A foreign data set applies its own transform
            in either case.
        limit: maximum number of images, the first in the (shuffled) order.
        rank: number of this process.
        world_size: number of processes; every image goes to exactly one of them.
        drop_last: drop an incomplete last batch, unless it is the only one.
        workers: processes that read a data set that is not ``ImageTensors``. ``auto``: none for
            data sets that hold tensors and for passes of up to 256 images, otherwise as many as
            this process has cores, 16 at most; the first 64 images are read before they start,
            so that asking for one small batch starts none.

    Returns:
        An iterator of (images float32 (n, C, H, W), labels int64 (n,)) on ``device``.

    Raises:
        UserError: an invalid option, or a data set that cannot be read this way; while reading, an
            item that is no such pair, images of different sizes in one batch, or an image that
            cannot be read, with its index.
    """
    order = _order(dataset, shuffle=shuffle, seed=seed, limit=limit)
    plan = _plan(order, batch_size, drop_last=drop_last)
    if not 0 <= rank < world_size or world_size > batch_size:
        raise UserError(
            f"batch_size: {batch_size} images for process {rank} of {world_size}; every process "
            f"needs at least one image of a batch"
        )
    if augment and not can_augment(dataset):
        raise UserError(
            "augment: the data set says no augmentation; load it with one, or use augment=false"
        )
    if workers != "auto" and workers < 0:
        raise UserError(f"workers: {workers} was given; give 0 or more, or auto")
    if isinstance(dataset, ImageTensors):
        return _tensor_batches(dataset, plan, torch.device(device), seed, augment, rank, world_size)
    shares = [share.tolist() for batch in plan if len(share := batch[rank::world_size])]
    return loaded(
        dataset,
        shares,
        device=torch.device(device),
        seed=seed,
        augment=augment,
        workers=workers,
        world_size=world_size,
    )


def number_of_batches(
    dataset: Dataset[Any], *, batch_size: int, limit: int | None = None, drop_last: bool = False
) -> int:
    """Return the number of batches that :func:`batches` yields for ``dataset``."""
    order = _order(dataset, shuffle=False, seed=0, limit=limit)
    return len(_plan(order, batch_size, drop_last=drop_last))


def _order(dataset: Dataset[Any], *, shuffle: bool, seed: int, limit: int | None) -> Tensor:
    length = check_map_style(dataset)
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} images were given; give 1 or more, or none")
    if not shuffle:
        return torch.arange(length)[:limit]
    generator = torch.Generator().manual_seed(seed_from(seed, "order"))
    return torch.randperm(length, generator=generator)[:limit]


def _plan(order: Tensor, batch_size: int, *, drop_last: bool) -> Sequence[Tensor]:
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} images were given; give 1 or more")
    plan = torch.split(order, batch_size)
    return plan[:-1] if drop_last and len(plan) > 1 and len(plan[-1]) < batch_size else plan


def _tensor_batches(
    dataset: ImageTensors,
    plan: Sequence[Tensor],
    device: torch.device,
    seed: int,
    augment: bool,
    rank: int,
    world_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    if dataset.nbytes <= RESIDENT_BYTES:
        dataset = dataset.to(device)
    augmentation = dataset.augmentation if augment else None
    generator = torch.Generator().manual_seed(seed_from(seed, "augmentation"))
    for batch in plan:
        # Drawn for the whole batch and then shared, so that the draws do not depend on the
        # number of processes.
        draws = augmentation.draw(len(batch), generator) if augmentation else None
        indices = batch[rank::world_size].to(dataset.images.device)
        if not len(indices):
            continue
        images = dataset.images[indices].to(device, non_blocking=True)
        labels = dataset.labels[indices].to(device, non_blocking=True)
        if augmentation is not None and draws is not None:
            images = augmentation.apply(images, draws[rank::world_size])
        yield dataset.normalise(images), labels
