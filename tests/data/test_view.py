"""Subsets, draws and joined sets of data that is not in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fusion.data import (
    ClassSubset,
    ImageFiles,
    ImageTensors,
    ImageView,
    LabelledImages,
    batches,
    concat,
    few,
    image_folder,
)
from fusion.errors import UserError

Make = Callable[[ImageTensors], Dataset[object]]


def as_pairs(dataset: ImageTensors) -> Dataset[object]:
    """The same images as somebody else's data set, normalised and without names."""
    return TensorDataset(dataset.normalise(dataset.images), dataset.labels)


def as_torchvision(dataset: ImageTensors) -> Dataset[object]:
    pairs = as_pairs(dataset)
    pairs.classes = list(dataset.class_names)  # type: ignore[attr-defined]
    pairs.targets = dataset.labels.tolist()  # type: ignore[attr-defined]
    pairs.mean, pairs.std = dataset.mean, dataset.std  # type: ignore[attr-defined]
    return pairs


def as_parts(dataset: ImageTensors) -> Dataset[object]:
    half = len(dataset) // 2
    halves = range(half), range(half, len(dataset))
    return ConcatDataset([Subset(as_torchvision(dataset), list(half)) for half in halves])


OPERATIONS: list[Callable[..., LabelledImages]] = [
    lambda data: ClassSubset(data, [7, 2, 4]),
    lambda data: ClassSubset(ClassSubset(data, [4, 5, 6, 7]), [3, 1]),
    lambda data: few(data, 60, seed=3),
    lambda data: few(ClassSubset(data, [1, 8]), 20, stratified=False),
    lambda data: concat([ClassSubset(data, [9, 0]), ClassSubset(data, [4, 0])]),
    lambda data: ClassSubset(data, [5, 3]).select(torch.tensor([4, 0, 9])),
]


@pytest.mark.parametrize("make", [as_pairs, as_torchvision, as_parts])
@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_views_of_any_data_set_are_what_they_are_in_memory(
    train_digits: ImageTensors, make: Make, operation: int
) -> None:
    held = OPERATIONS[operation](train_digits)
    view = OPERATIONS[operation](make(train_digits))
    assert isinstance(held, ImageTensors)
    assert isinstance(view, ImageView)
    assert view.original_labels == held.original_labels
    assert view.class_names == (None if make is as_pairs else held.class_names)
    assert torch.equal(view.labels, held.labels)
    for one, other in zip(
        batches(held, batch_size=50, shuffle=True, limit=90),
        batches(view, batch_size=50, shuffle=True, limit=90),
        strict=True,
    ):
        torch.testing.assert_close(one[0], other[0])
        assert torch.equal(one[1], other[1])
    with pytest.raises(IndexError):
        view[len(view)]


def test_streamed_subsets_decode_nothing_and_read_what_they_should(
    photos: Path, streamed: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delattr("fusion.data.decoding.Decoding.read")
        flower = ClassSubset(ClassSubset(streamed, ["flower", "china"]), ["flower"])
        drawn = few(streamed, 9, seed=1)
        joined = concat([ClassSubset(streamed, ["china"]), flower])
    assert flower.original_labels == (1,)
    assert torch.equal(flower[5][0], streamed[13][0])
    assert joined.class_names == streamed.class_names
    assert [torch.equal(joined[n][0], streamed[n][0]) for n in range(14)] == [True] * 14
    held = image_folder(photos, image_size=48, in_memory=True)
    expected = few(held, 9, seed=1)
    assert torch.equal(drawn.labels, expected.labels)
    plain = image_folder(photos, image_size=48, in_memory=False, draft=False)
    assert torch.equal(few(plain, 9, seed=1)[4][0], expected[4][0])


def test_subsets_of_subsets_are_flat(streamed: ImageFiles) -> None:
    view: LabelledImages = streamed
    for _ in range(5):
        view = few(ClassSubset(view, ["china", "flower"]), 14)
    assert isinstance(view, ImageView)
    assert view.sources == (streamed,)
    assert repr(view) == f"ImageView(14 images, 2 classes, of {streamed!r})"


def test_subsets_augment_as_the_whole_does(photos: Path) -> None:
    crops = image_folder(photos, image_size=48, augmentation=v2.RandomResizedCrop(32))
    shifts = image_folder(photos, image_size=48, in_memory=False)
    for dataset, side in ((crops, 32), (shifts, 48)):
        part = ClassSubset(dataset, ["flower"])
        plain, _ = next(batches(part, batch_size=6))
        augmented, _ = next(batches(part, batch_size=6, augment=True))
        assert augmented.shape[-1] == side
        assert side != 48 or not torch.equal(plain, augmented)
    none = image_folder(photos, image_size=48, in_memory=False, augmentation=None)
    with pytest.raises(UserError, match="the data set says no augmentation"):
        batches(few(none, 3), batch_size=2, augment=True)


def test_a_torchvision_folder_keeps_its_own_transform(photos: Path, streamed: ImageFiles) -> None:
    steps = [v2.Resize(60), v2.CenterCrop(48), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    part = ClassSubset(ImageFolder(str(photos), transform=v2.Compose(steps)), ["flower"])
    assert part.class_names == ("flower",)
    for augment in (False, True):
        images, labels = next(batches(part, batch_size=6, augment=augment))
        assert images.shape == (6, 3, 48, 48)
        assert 0 <= images.min() < images.max() <= 1
        assert labels.tolist() == [0] * 6


def test_classes_of_a_set_without_names_are_chosen_by_label(train_digits: ImageTensors) -> None:
    with pytest.raises(UserError, match=r"'7' is not a class of TensorDataset.*have no names"):
        ClassSubset(as_pairs(train_digits), ["7"])
    twins = TensorDataset(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    twins.classes = ["crane", "crane"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"several classes of .* are named 'crane'"):
        ClassSubset(twins, ["crane"])
    assert ClassSubset(twins, [1]).class_names == ("crane",)


def test_sets_that_are_joined_must_agree_wherever_they_are(
    photos: Path, streamed: ImageFiles, train_digits: ImageTensors
) -> None:
    other = image_folder(photos, image_size=48, in_memory=False, mean=[0.5] * 3)
    with pytest.raises(UserError, match="number 1 has normalisation"):
        concat([streamed, other])
    with pytest.raises(UserError, match="number 1 has normalisation"):
        concat([streamed, as_pairs(train_digits)])  # type: ignore[list-item]
    renamed = image_folder(photos, image_size=48, in_memory=False, class_names=["flower", "china"])
    with pytest.raises(UserError, match="original label 0 is 'china' in one set and 'flower'"):
        concat([streamed, renamed])
    held = image_folder(photos, image_size=48, in_memory=True)
    mixed = concat([streamed, held])
    assert len(mixed) == 28
    assert torch.equal(mixed[20][0], held[6][0])
