"""Read images one by one, in worker processes where that pays, with the same result either way."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import current_process
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fusion.data.foreign_images import holds_tensors, read_pair
from fusion.data.labelled_images import LabelledImages
from fusion.data.randomness import own_random_numbers, seed_global_generators
from fusion.data.seeds import seed_from
from fusion.errors import UserError, first_line

# Images that a worker reads at a time. Batches are put together from such pieces, so that several
# workers share a large batch, and what they have read ahead stays small: 2 × 64 photographs of
# 224×224 take 19 MB a worker.
_PIECE = 64
# For foreign data sets, whose pixels are four times as large: a batch up to this size is not
# divided, since joining its pieces would be the only copy that it needs.
_FOREIGN_PIECE = 128
_PREFETCH = 2  # pieces a worker reads ahead
# With "auto", workers start where a pass reads more images than this: half a second or more of
# decoding, against 0.1 s to start them by fork and 3 s by spawn.
_WORTH_WORKERS = 256
_MOST_WORKERS = 16  # beyond this, more of them seldom help one device

Batch = tuple[Tensor, Tensor]


def loaded(
    dataset: Dataset[Any],
    shares: Sequence[Sequence[int]],
    *,
    device: torch.device,
    seed: int,
    augment: bool,
    workers: int | Literal["auto"],
    world_size: int,
) -> Iterator[Batch]:
    """Yield one batch for each list of indices in ``shares``, normalised and on ``device``.

    Whatever is random in an image depends on ``seed`` and its index alone; see
    :func:`fusion.data.batches`.

    Raises:
        UserError: an item is no (image, label) pair, images of a batch differ in size, or the data
            set fails to read one; the message names the data set and the index.
    """
    reader = _Reader(dataset, seed=seed, augment=augment)
    ours = dataset if isinstance(dataset, LabelledImages) else None
    size = _PIECE if ours is not None else _FOREIGN_PIECE
    plan = [[list(share[at : at + size]) for at in range(0, len(share), size)] for share in shares]
    read = _pieces(reader, list(itertools.chain.from_iterable(plan)), device, workers, world_size)
    for share, pieces in zip(shares, plan, strict=True):
        batch: Tensor | None = None
        labels = torch.empty(len(share), dtype=torch.int64, device=device)
        for start, indices in zip(range(0, len(share), size), pieces, strict=True):
            images, named = next(read)
            labels[start : start + size] = named.to(device, non_blocking=True)
            images = images.to(device, non_blocking=True)
            if ours is None and len(pieces) == 1:
                batch = images.to(torch.float32)  # where the worker put it, without a copy
                break
            if batch is None:
                # Filled in place: pieces joined first would be another copy, which in the end
                # costs more memory than its size, because it splits the heap.
                shape = len(share), *images.shape[1:]
                batch = torch.empty(shape, dtype=torch.float32, device=device)
            elif batch.shape[1:] != images.shape[1:]:
                raise _differ(dataset, share[0], batch[0], indices[0], images[0])
            part = batch[start : start + size]
            part.copy_(images) if ours is None else ours.normalise(images, out=part)
        assert batch is not None
        yield batch, labels


def worker_count(dataset: Dataset[Any], images: int, world_size: int = 1) -> int:
    """Return the number of workers for ``workers="auto"``.

    None for data sets that hold tensors, for passes of up to 256 images, and in daemonic
    processes, which may have no children; otherwise this process's share of the processor's
    cores, 16 at most.
    """
    if images <= _WORTH_WORKERS or holds_tensors(dataset) or current_process().daemon:
        return 0
    available = getattr(os, "sched_getaffinity", None)  # Linux only; batch systems set it
    cores = len(available(0)) if available is not None else os.cpu_count() or 1
    return max(1, min(cores // world_size, _MOST_WORKERS))


def _pieces(
    reader: _Reader,
    pieces: list[list[int]],
    device: torch.device,
    workers: int | Literal["auto"],
    world_size: int,
) -> Iterator[Batch]:
    if workers == "auto":
        workers = worker_count(reader.dataset, sum(map(len, pieces)), world_size)
        if workers:
            # A caller that needs one batch only, to trace a network for example, starts no workers.
            # Neither do images on a GPU, which forked processes cannot use.
            first = reader.read(pieces[0])
            yield first
            pieces = pieces[1:]
            if first[0].device.type != "cpu":
                workers = 0
    if workers == 0 or len(pieces) < 2:
        yield from map(reader.read, pieces)
        return
    loader = DataLoader(
        reader,
        batch_sampler=pieces,
        collate_fn=_as_it_is,
        num_workers=min(workers, len(pieces)),
        prefetch_factor=_PREFETCH,
        pin_memory=device.type == "cuda",
        # A separate generator, or the loader would draw from torch's global one.
        generator=torch.Generator().manual_seed(0),
    )
    for read in loader:
        if isinstance(read, _Failure):
            raise UserError(read.sentence) from RuntimeError(read.traceback)
        yield read[0], read[1]  # pinning makes a list of the pair


@dataclass(frozen=True)
class _Failure:
    """A user's mistake in a worker: raised there, its message would arrive inside a traceback."""

    sentence: str
    traceback: str


class _Reader(Dataset[Any]):
    """Reader of several images at a time, each with separate random numbers."""

    def __init__(self, dataset: Dataset[Any], *, seed: int, augment: bool) -> None:
        self.dataset = dataset
        self._seed = seed
        self._augment = augment

    def __getitems__(self, indices: list[int]) -> Batch | _Failure:
        try:
            return self.read(indices)
        except UserError as error:
            return _Failure(str(error), traceback.format_exc())

    def read(self, indices: list[int]) -> Batch:
        images: list[Tensor] = []
        labels: list[int] = []
        with own_random_numbers():
            for index in indices:
                seed_global_generators(seed_from(self._seed, "image", index))
                image, label = self._pair(index)
                if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
                    raise _differ(self.dataset, indices[0], images[0], index, image)
                images.append(image)
                labels.append(label)
        # Stacked by torch's own function, which in a worker stacks in shared memory.
        return default_collate(images).contiguous(), torch.tensor(labels)

    def _pair(self, index: int) -> tuple[Tensor, int]:
        dataset = self.dataset
        try:
            if isinstance(dataset, LabelledImages):
                return dataset.pixels(index, augment=self._augment), int(dataset.labels[index])
            return read_pair(dataset, index, augment=self._augment)
        except UserError:
            raise
        except Exception as error:  # a foreign data set may raise anything
            raise UserError(
                f"dataset: {_name(dataset)} cannot read the image at index {index} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error


def _as_it_is(piece: Any) -> Any:
    return piece


def _differ(
    dataset: Dataset[Any], first: int, one: Tensor, second: int, other: Tensor
) -> UserError:
    kinds = [f"{'x'.join(map(str, i.shape))} {str(i.dtype)[6:]}" for i in (one, other)]
    return UserError(
        f"dataset: {_name(dataset)} gives an image {kinds[0]} at index {first} and {kinds[1]} at "
        f"index {second}; give it a size, or a transform that ends in images of one size and type"
    )


def _name(dataset: Dataset[Any]) -> str:
    return repr(dataset) if isinstance(dataset, LabelledImages) else type(dataset).__name__
