from __future__ import annotations

import pytest
import torch

from fusion.data import ClassSubset, ImageTensors, concat
from fusion.errors import UserError


def test_parts_joined_are_the_whole_again(train_digits: ImageTensors) -> None:
    parts = [ClassSubset(train_digits, classes) for classes in ([9, 8, 7, 6, 5, 4], [3, 1, 2, 0])]
    whole = concat(parts)
    assert whole.class_names == train_digits.class_names
    assert whole.original_labels == tuple(range(10))
    for label in range(10):
        expected = train_digits.images[train_digits.labels == label]
        assert torch.equal(whole.images[whole.labels == label], expected)


def test_classes_that_are_missing_leave_no_gap_in_the_labels(train_digits: ImageTensors) -> None:
    joined = concat([ClassSubset(train_digits, [8, 3]), ClassSubset(train_digits, [5, 3])])
    assert joined.original_labels == (3, 5, 8)
    assert torch.unique(joined.labels).tolist() == [0, 1, 2]
    assert (joined.labels == 0).sum() == 2 * (train_digits.labels == 3).sum()


def test_sets_that_disagree_are_refused(train_digits: ImageTensors, numbered: ImageTensors) -> None:
    with pytest.raises(UserError, match="give a non-empty list"):
        concat([])
    with pytest.raises(UserError, match="number 1 has images of shape"):
        concat([train_digits, numbered])
    renamed = ImageTensors(
        train_digits.images,
        train_digits.labels,
        class_names=["zero", *train_digits.class_names[1:]],
        mean=train_digits.mean,
        std=train_digits.std,
    )
    with pytest.raises(UserError, match="original label 0 is '0' in one set and 'zero'"):
        concat([train_digits, renamed])
