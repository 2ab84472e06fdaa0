"""Batches of images on the device: shuffled, augmented, shared among processes, all seeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fusion.data.image_tensors import ImageTensors
from fusion.data.seeds import seed_from
from fusion.errors import UserError

# Sets up to this size are copied to the device whole; larger ones travel batch by batch.
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
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over ``dataset`` in batches of normalised images and their labels.

    Order and augmentation depend on ``seed`` alone: not on the device, on the number of
    processes or on torch's global generator.

    Args:
        dataset: :class:`ImageTensors`, or any map-style data set of (image, label) pairs whose
            images are tensors, normalised by the data set itself.
        batch_size: images a batch, counted over all processes: with four processes a batch of
            128 is 32 images in each.
        device: where the batches are wanted.
        shuffle: random order; otherwise the order of the data set.
        seed: give another one for each epoch.
        augment: apply the data set's own augmentation.
        limit: use this many images at most, the first in the (shuffled) order.
        rank: number of this process.
        world_size: number of processes; every image goes to exactly one of them.
        drop_last: leave out a last batch that is not full, unless it is the only one.
        workers: processes that load a data set that is not ``ImageTensors``.

    Returns:
        An iterator of (images float32 (n, C, H, W), labels int64 (n,)) on ``device``.

    Raises:
        UserError: an impossible option, or a data set that cannot be read this way.
    """
    order = _order(dataset, shuffle=shuffle, seed=seed, limit=limit)
    plan = _plan(order, batch_size, drop_last=drop_last)
    if not 0 <= rank < world_size or world_size > batch_size:
        raise UserError(
            f"batch_size: {batch_size} images for process {rank} of {world_size}; every process "
            f"needs at least one image of a batch"
        )
    if isinstance(dataset, ImageTensors):
        if augment and dataset.augmentation is None:
            raise UserError(
                "augment: the data set says no augmentation; load it with one, or use augment=false"
            )
        return _tensor_batches(dataset, plan, torch.device(device), seed, augment, rank, world_size)
    if augment:
        raise UserError(
            f"augment: a {type(dataset).__name__} augments by its own transform; use augment=false"
        )
    shares = [share.tolist() for batch in plan if len(share := batch[rank::world_size])]
    return _loaded_batches(dataset, shares, torch.device(device), seed, workers)


def number_of_batches(
    dataset: Dataset[Any], *, batch_size: int, limit: int | None = None, drop_last: bool = False
) -> int:
    """Return how many batches :func:`batches` makes of ``dataset``."""
    order = _order(dataset, shuffle=False, seed=0, limit=limit)
    return len(_plan(order, batch_size, drop_last=drop_last))


def _order(dataset: Dataset[Any], *, shuffle: bool, seed: int, limit: int | None) -> Tensor:
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise UserError(
            f"dataset: a {type(dataset).__name__} has no length; give a map-style data set, "
            f"which has __len__ and __getitem__"
        )
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} images were asked for; give 1 or more, or none")
    if not len(dataset):
        raise UserError(f"dataset: the {type(dataset).__name__} is empty")
    if not shuffle:
        return torch.arange(len(dataset))[:limit]
    generator = torch.Generator().manual_seed(seed_from(seed, "order"))
    return torch.randperm(len(dataset), generator=generator)[:limit]


def _plan(order: Tensor, batch_size: int, *, drop_last: bool) -> Sequence[Tensor]:
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} images were asked for; give 1 or more")
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


def _loaded_batches(
    dataset: Dataset[Any],
    shares: list[list[int]],
    device: torch.device,
    seed: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    image = dataset[shares[0][0]][0] if shares else None
    if shares and not isinstance(image, Tensor):
        raise UserError(
            f"dataset: {type(dataset).__name__} gives images of type {type(image).__name__}; give "
            f"it a transform that ends in a normalised tensor"
        )
    # A generator of its own, or the loader would draw from torch's global one.
    generator = torch.Generator().manual_seed(seed_from(seed, "loader"))
    loader = DataLoader(dataset, batch_sampler=shares, generator=generator, num_workers=workers)
    for images, labels in loader:
        yield (
            images.to(device, torch.float32, non_blocking=True),
            labels.to(device, torch.int64, non_blocking=True),
        )
