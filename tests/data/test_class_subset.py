from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fusion.data import ClassSubset, ImageTensors
from fusion.errors import UserError


def test_a_subset_relabels_in_the_order_given(train_digits: ImageTensors) -> None:
    subset = ClassSubset(train_digits, [7, 2])
    assert subset.class_names == ("7", "2")
    assert subset.original_labels == (7, 2)
    for label, original in ((0, 7), (1, 2)):
        expected = train_digits.images[train_digits.labels == original]
        assert torch.equal(subset.images[subset.labels == label], expected)


def test_a_subset_of_a_subset_remembers_the_full_data_set(train_digits: ImageTensors) -> None:
    inner = ClassSubset(ClassSubset(train_digits, [4, 5, 6, 7]), [3, 1])
    assert inner.original_labels == (7, 5)
    assert inner.class_names == ("7", "5")


def test_names_and_labels_choose_alike(train_digits: ImageTensors) -> None:
    by_name, by_label = ClassSubset(train_digits, ["3", "8"]), ClassSubset(train_digits, [3, 8])
    assert torch.equal(by_name.labels, by_label.labels)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes is .*; give a non-empty list"),
        ([1, 1], "each once"),
        ([1, "1"], "each once"),
        ([10], "10 is not a class"),
        ([-1], "-1 is not a class"),
        (["ten"], "'ten' is not a class"),
    ],
)
def test_wrong_classes_are_refused(
    train_digits: ImageTensors, classes: Sequence[int | str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ClassSubset(train_digits, classes)


def test_a_class_without_images_is_refused(train_digits: ImageTensors) -> None:
    no_nines = train_digits.select(torch.nonzero(train_digits.labels != 9).squeeze(1))
    with pytest.raises(UserError, match="no images of \\['9'\\]"):
        ClassSubset(no_nines, [8, 9])
