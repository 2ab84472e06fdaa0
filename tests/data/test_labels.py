from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from fusion.data import ImageTensors, class_names_of, labels_of
from fusion.errors import UserError

LABELS = [2, 0, 1, 1]


class Silent(Dataset[object]):
    """Says nothing about its labels and cannot be read."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        raise AssertionError("an image was read")


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": torch.tensor(LABELS, dtype=torch.int32)},
        {"targets": LABELS},
        {"_labels": np.array(LABELS)},
        {"samples": [(f"{label}.jpg", label) for label in LABELS]},
        {"imgs": [(f"{label}.jpg", label) for label in LABELS]},
        {"targets": [9, 7, 8, 8], "target_transform": lambda label: label - 7},
        {"targets": torch.tensor([9, 7, 8, 8]), "target_transform": {9: 2, 7: 0, 8: 1}.get},
    ],
)
def test_labels_are_found_without_reading_images(attributes: dict[str, object]) -> None:
    found = labels_of(Silent(**attributes))
    assert found.dtype == torch.int64
    assert found.tolist() == LABELS


def test_labels_pass_through_subsets_and_joined_sets_of_torch(numbered: ImageTensors) -> None:
    part = Subset(Silent(targets=LABELS), [3, 0])
    assert labels_of(part).tolist() == [1, 2]
    assert labels_of(ConcatDataset([part, numbered])).tolist() == [1, 2, *numbered.labels.tolist()]
    assert labels_of(TensorDataset(torch.rand(4, 1), torch.tensor(LABELS))).tolist() == LABELS


def test_a_data_set_that_states_no_labels_is_read_once_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unlabelled(Silent):
        def __getitem__(self, index: int) -> object:
            random.random()
            return None, np.int64(LABELS[index])

    state = random.getstate()
    with caplog.at_level(logging.INFO, "fusion.data"):
        assert labels_of(Unlabelled()).tolist() == LABELS
    assert "Unlabelled: reading all 4 images for their labels" in caplog.text
    assert random.getstate() == state


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(LABELS)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Silent(targets=[0.5] * 4), "the labels of Silent are float32 of shape"),
        (Silent(targets=[[0, 1]] * 4), r"int64 of shape \(4, 2\)"),
        (Silent(targets=["cat"] * 4), "the labels of Silent are not whole numbers"),
        (Silent(targets=[0, 1]), "states 2 labels for 4 images"),
        (Stream(), "a Stream has no length"),
    ],
)
def test_labels_that_are_no_whole_numbers_are_refused(
    dataset: Dataset[object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        labels_of(dataset)


def test_class_names_are_those_of_the_project_or_of_torchvision(
    photos: Path, train_digits: ImageTensors
) -> None:
    folder = ImageFolder(str(photos))
    assert class_names_of(folder) == ("china", "flower")
    assert class_names_of(Subset(folder, [0])) == ("china", "flower")
    assert class_names_of(ConcatDataset([folder, folder])) == ("china", "flower")
    assert class_names_of(ConcatDataset([folder, train_digits])) is None
    assert class_names_of(train_digits) == train_digits.class_names
    assert class_names_of(Silent()) is None
    imagenet = Silent(classes=[("tench", "Tinca tinca"), ("goldfish",)])
    assert class_names_of(imagenet) == ("tench, Tinca tinca", "goldfish")
