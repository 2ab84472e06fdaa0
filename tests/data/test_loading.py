from __future__ import annotations

import random
from collections.abc import Iterator
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fusion.data import Augmentation, ImageFiles, ImageTensors, batches, image_folder
from fusion.data.loading import worker_count
from fusion.errors import UserError


def all_of(dataset: Dataset[object], **options: object) -> tuple[Tensor, Tensor]:
    read = list(batches(dataset, **{"batch_size": 4} | options))  # type: ignore[arg-type]
    return torch.cat([images for images, _ in read]), torch.cat([labels for _, labels in read])


class Dice:
    """Draws from all three global generators."""

    def __call__(self, image: Image.Image) -> Image.Image:
        factor = random.uniform(0.5, 1) * np.random.uniform(0.5, 1)  # noqa: NPY002
        return image.point(lambda value: value * factor)


@pytest.fixture
def random_crops(photos: Path) -> ImageFiles:
    steps = [v2.RandomResizedCrop(32), Dice(), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3)]
    dataset = image_folder(photos, image_size=48, augmentation=steps)
    assert isinstance(dataset, ImageFiles)
    return dataset


@pytest.fixture
def foreign(photos: Path) -> ImageFolder:
    """Somebody else's data set, with a random transform of its own."""
    steps = [v2.RandomResizedCrop(32), Dice(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return ImageFolder(str(photos), transform=v2.Compose(steps))


@pytest.mark.parametrize("kind", ["random_crops", "foreign"])
def test_an_image_depends_on_the_seed_and_its_index_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(kind)

    def run(**options: object) -> Tensor:
        return all_of(dataset, augment=True, **{"shuffle": True, "seed": 3} | options)[0]

    alone = run(workers=0)
    assert not torch.equal(alone, run(workers=0, seed=4))
    for workers in (1, 2):
        assert torch.equal(run(workers=workers), alone)
    assert torch.equal(run(workers=0, batch_size=5), alone)
    shares = [run(workers=0, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(shares[0], alone[0::2])
    assert torch.equal(shares[1], alone[1::2])
    in_order = run(workers=0, shuffle=False)
    order = all_of(numbers(len(alone)), shuffle=True, seed=3)[1]
    assert torch.equal(in_order[order], alone)


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.zeros(count, 1, 1, 1), torch.arange(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(random_crops: ImageFiles, workers: int) -> None:
    def states() -> tuple[object, ...]:
        python, array = random.getstate(), np.random.get_state()[1]  # noqa: NPY002
        return torch.get_rng_state().tolist(), python, array.tolist()  # type: ignore[union-attr]

    before = states()
    for _ in batches(random_crops, batch_size=5, augment=True, workers=workers):
        assert states() == before  # between batches as well
    assert states() == before


def test_large_batches_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TensorDataset(torch.rand(150, 1, 2, 2), torch.arange(150))
    whole = all_of(dataset, batch_size=150, shuffle=True)
    monkeypatch.setattr("fusion.data.loading._FOREIGN_PIECE", 8)
    for workers in (0, 2):
        sizes = []
        for images, labels in batches(dataset, batch_size=70, shuffle=True, workers=workers):
            sizes.append(len(images))
            assert torch.equal(images, dataset.tensors[0][labels])
        assert sizes == [70, 70, 10]
        assert torch.equal(
            all_of(dataset, batch_size=70, shuffle=True, workers=workers)[1], whole[1]
        )


def test_workers_start_where_they_pay(
    streamed: ImageFiles, numbered: ImageTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(40)), raising=False)
    many = 10**4
    assert worker_count(streamed, many) == 16
    assert worker_count(streamed, many, world_size=8) == 5
    assert worker_count(streamed, many, world_size=80) == 1
    assert worker_count(streamed, 100) == 0
    for in_memory in (numbered, numbers(3), Subset(numbers(3), [0]), ConcatDataset([numbers(3)])):
        assert worker_count(in_memory, many) == 0
    monkeypatch.setattr("fusion.data.loading.current_process", lambda: Process(daemon=True))
    assert worker_count(streamed, many) == 0


def test_one_batch_starts_no_workers(streamed: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        def __init__(self, *_: object, **__: object) -> None:
            raise AssertionError("a loader was made")

    monkeypatch.setattr("fusion.data.loading.DataLoader", Loader)
    monkeypatch.setattr("fusion.data.loading._WORTH_WORKERS", 0)
    images, _ = next(batches(streamed, batch_size=2))
    assert images.shape == (2, 3, 48, 48)
    all_of(streamed, limit=4, workers=2)
    with pytest.raises(AssertionError, match="a loader was made"):
        all_of(streamed)


def test_augmentation_reaches_sets_of_ours_inside_subsets_of_torch(
    random_crops: ImageFiles, streamed: ImageFiles
) -> None:
    whole = all_of(random_crops, augment=True)[0]
    part = all_of(Subset(random_crops, [0, 1, 2]), augment=True)[0]
    assert torch.equal(part, whole[:3])
    joined = ConcatDataset([random_crops, random_crops])
    assert torch.equal(all_of(joined, augment=True, limit=14)[0], whole)
    assert joined[15][0].shape == streamed[1][0].shape
    plain = image_folder(random_crops.root, image_size=48, augmentation=None)
    for nested in (Subset(plain, [0]), ConcatDataset([random_crops, plain])):
        with pytest.raises(UserError, match="the data set says no augmentation"):
            batches(nested, batch_size=2, augment=True)


class Odd(Dataset[object]):
    """Ten images; the seventh item is what is given."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> object:
        if index != 7:
            return torch.zeros(3, 4, 4), index
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


MISTAKES: list[tuple[object, str]] = [
    ((Image.new("RGB", (4, 4)), 0), "gives an image of type Image at index 7; .* transform"),
    ((torch.zeros(3, 4, 4, dtype=torch.uint8), 0), "gives an image of type torch.uint8 at index 7"),
    ({"image": torch.zeros(3, 4, 4), "label": 0}, "gives a dict at index 7; .*pairs"),
    ((torch.zeros(3, 4, 4), 0, 0), "gives a tuple of 3 at index 7"),
    ((torch.zeros(3, 4, 4), 0.5), "gives a label of type float at index 7"),
    ((torch.zeros(3, 4, 4), torch.zeros(10)), "gives a label of type torch.float32 at index 7"),
    (
        (torch.zeros(3, 5, 4), 0),
        "gives an image 3x4x4 float32 at index 6 and 3x5x4 float32 at index 7",
    ),
    (ValueError("too late\nfor this"), r"cannot read .* index 7 \(ValueError: too late\)"),
]


@pytest.mark.parametrize(("item", "message"), MISTAKES)
def test_what_a_data_set_may_not_give_is_named_with_its_index(item: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^dataset: Odd {message}"):
        all_of(Odd(item), batch_size=2)


def test_a_mistake_in_a_worker_is_one_sentence_too() -> None:
    with pytest.raises(UserError, match=r"^dataset: Odd cannot read.*$") as caught:
        all_of(Odd(ValueError("no")), batch_size=3, workers=1)
    assert "in __getitem__" in str(caught.value.__cause__)  # for whoever looks for the place


def test_sizes_that_differ_between_pieces_of_a_batch_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fusion.data.loading._FOREIGN_PIECE", 1)
    with pytest.raises(
        UserError, match="an image 3x4x4 float32 at index 0 and 3x5x4 float32 at index 7"
    ):
        all_of(Odd((torch.zeros(3, 5, 4), 0)), batch_size=10)


def test_negative_workers_are_refused(numbered: ImageTensors) -> None:
    with pytest.raises(UserError, match="workers: -1 was given"):
        batches(numbered, batch_size=2, workers=-1)


def test_an_augmentation_of_pixels_shifts_streamed_images(photos: Path) -> None:
    dataset = image_folder(
        photos, image_size=48, in_memory=False, augmentation=Augmentation(padding=2, flip=False)
    )
    plain, shifted = all_of(dataset)[0], all_of(dataset, augment=True)[0]
    padded = torch.nn.functional.pad(dataset.pixels(0)[None], [2] * 4)
    black = dataset.normalise(padded)[0]
    windows = [black[:, y : y + 48, x : x + 48] for y in range(5) for x in range(5)]
    assert sum(torch.equal(window, shifted[0]) for window in windows) == 1
    assert not torch.equal(plain, shifted)


def epochs(dataset: Dataset[object]) -> Iterator[Tensor]:
    for seed in range(2):
        yield all_of(dataset, augment=True, seed=seed)[0]


def test_another_seed_augments_otherwise(random_crops: ImageFiles) -> None:
    first, second = epochs(random_crops)
    assert first.shape == second.shape == (14, 3, 32, 32)
    assert (first != second).flatten(1).any(1).all()
