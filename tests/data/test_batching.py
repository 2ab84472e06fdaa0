from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fusion.data import ImageTensors, batches, number_of_batches
from fusion.errors import UserError


def numbers(images: Tensor) -> list[int]:
    return [int(value) for value in images[:, 0, 0, 0]]


def test_an_epoch_gives_every_image_once_with_its_label(numbered: ImageTensors) -> None:
    seen = []
    for images, labels in batches(numbered, batch_size=4, shuffle=True):
        assert images.dtype == torch.float32
        assert labels.tolist() == [number % 3 for number in numbers(images)]
        seen += numbers(images)
    assert seen != list(range(10))
    assert sorted(seen) == list(range(10))


def test_the_order_depends_on_the_seed_alone(numbered: ImageTensors) -> None:
    def order(seed: int) -> list[int]:
        return numbers(
            torch.cat([i for i, _ in batches(numbered, batch_size=3, shuffle=True, seed=seed)])
        )

    first = order(0)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert order(0) == first
    assert order(1) != first
    torch.set_rng_state(state)
    order(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("limit", "drop_last", "sizes"),
    [
        (None, False, [4, 4, 2]),
        (None, True, [4, 4]),
        (5, False, [4, 1]),
        (3, True, [3]),
        (99, False, [4, 4, 2]),
    ],
)
def test_limit_and_drop_last(
    numbered: ImageTensors, limit: int | None, drop_last: bool, sizes: list[int]
) -> None:
    got = [len(i) for i, _ in batches(numbered, batch_size=4, limit=limit, drop_last=drop_last)]
    assert got == sizes
    count = number_of_batches(numbered, batch_size=4, limit=limit, drop_last=drop_last)
    assert count == len(sizes)


def test_processes_share_each_batch_and_its_augmentation(train_digits: ImageTensors) -> None:
    def run(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
        return list(
            batches(
                train_digits,
                batch_size=64,
                shuffle=True,
                augment=True,
                limit=129,
                rank=rank,
                world_size=world_size,
            )
        )

    alone, shares = run(0, 1), [run(rank, 2) for rank in range(2)]
    assert [len(run) for run in (alone, *shares)] == [3, 3, 2]  # the last batch has one image
    for batch in range(2):
        for part in range(2):  # images, labels
            whole = alone[batch][part]
            assert torch.equal(whole[0::2], shares[0][batch][part])
            assert torch.equal(whole[1::2], shares[1][batch][part])


def test_augmentation_changes_images_with_the_seed_and_stays_one_pixel(
    train_digits: ImageTensors,
) -> None:
    def first(seed: int, augment: bool) -> Tensor:
        return next(batches(train_digits, batch_size=50, seed=seed, augment=augment))[0]

    plain = first(0, augment=False)
    assert torch.equal(first(0, augment=True), first(0, augment=True))
    assert not torch.equal(first(0, augment=True), first(1, augment=True))
    black = plain.min()
    shifts = [
        torch.nn.functional.pad(plain, [1, 1, 1, 1], value=float(black))[:, :, y : y + 8, x : x + 8]
        for y in range(3)
        for x in range(3)
    ]
    distance = torch.stack([(first(0, augment=True) - s).abs().amax((1, 2, 3)) for s in shifts])
    assert distance.amin(0).max() < 1e-5


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index % 3


@pytest.mark.parametrize("dataset", [Pairs(), TensorDataset(torch.zeros(10, 1, 2, 2).double())])
def test_any_map_style_data_set_is_read_in_the_same_order(
    numbered: ImageTensors, dataset: Dataset[object]
) -> None:
    if isinstance(dataset, TensorDataset):
        images = torch.arange(10).view(10, 1, 1, 1).expand(10, 1, 2, 2).double()
        dataset = TensorDataset(images, torch.arange(10, dtype=torch.int32) % 3)
    state = torch.get_rng_state()
    ours = list(batches(numbered, batch_size=4, shuffle=True, seed=5, rank=1, world_size=2))
    theirs = list(batches(dataset, batch_size=4, shuffle=True, seed=5, rank=1, world_size=2))
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
        assert other_labels.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Pictures(Pairs):
    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override]
        return "picture", index


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (None, {"batch_size": 0}, "batch_size: 0"),
        (None, {"limit": 0}, "limit: 0"),
        (None, {"augment": True}, "the data set says no augmentation"),
        (None, {"rank": 2, "world_size": 2}, "process 2 of 2"),
        (None, {"batch_size": 1, "world_size": 2}, "at least one image"),
        (Stream(), {}, "a Stream has no length"),
        (Pictures(), {}, "gives an image of type str at index 0; give it a transform"),
    ],
)
def test_what_cannot_be_read_is_refused(
    numbered: ImageTensors, dataset: Dataset[object] | None, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(batches(dataset or numbered, **{"batch_size": 4} | options))  # type: ignore[arg-type]
