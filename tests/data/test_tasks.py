from __future__ import annotations

import pytest
import torch

from fusion.data import ClassSubset, ImageFiles, ImageTensors, grouped, quarter_turns
from fusion.errors import UserError
from fusion.target import build

PARITY = {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}


def test_groups_relabel_and_keep_the_images(train_digits: ImageTensors) -> None:
    parity = grouped(train_digits, PARITY)
    assert isinstance(parity, ImageTensors)
    assert parity.class_names == ("even", "odd")
    assert min(parity.original_labels) > 10**6  # classes that no real data set has
    assert torch.equal(parity.images, train_digits.images)
    assert torch.equal(parity.labels, train_digits.labels % 2)


def test_groups_name_classes_and_leave_others_out(train_digits: ImageTensors) -> None:
    spec = {
        "_target_": "fusion.data.grouped",
        "dataset": {"_target_": "fusion.data.digits"},
        "groups": {"round": ["0", 8], "straight": ["1"]},
    }
    found = build(spec)
    kept = torch.isin(train_digits.labels, torch.tensor([0, 1, 8]))
    assert torch.equal(found.images, train_digits.images[kept])
    assert torch.equal(found.labels, (train_digits.labels[kept] == 1).long())


def test_the_turn_is_the_label(train_digits: ImageTensors, streamed: ImageFiles) -> None:
    for dataset in (train_digits, streamed):
        turned = quarter_turns(dataset)
        assert turned.class_names == ("0°", "90°", "180°", "270°")
        for index in range(14):
            label = int(turned.labels[index])
            back = torch.rot90(turned.pixels(index), -label, (-2, -1))
            assert torch.equal(back, dataset.pixels(index))
    counts = torch.bincount(quarter_turns(train_digits).labels)
    assert counts.min() > len(train_digits) / 4 * 0.8
    other = quarter_turns(train_digits, seed=1).labels
    assert not torch.equal(other, quarter_turns(train_digits).labels)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "groups is {}; give a non-empty mapping"),
        ({"none": [], "one": [1]}, r"groups.none is \[\]; give a non-empty list"),
        ({"a": [1, 2], "b": ["2"]}, r"\['2'\] are named twice"),
        ({"a": [1, 1]}, r"\['1'\] are named twice"),
        ({"a": ["eleven"]}, "'eleven' is not a class"),
        ({"3": [3, 4], "b": [5]}, r"\['3'\] are classes of the data set"),
        ({"3": [4], "b": [5]}, r"\['3'\] are classes of the data set"),
    ],
)
def test_wrong_groups_are_refused(
    train_digits: ImageTensors, groups: dict[str, list[int | str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        grouped(train_digits, groups)


def test_a_class_may_stay_what_it_is(train_digits: ImageTensors) -> None:
    assert grouped(train_digits, {"3": [3], "rest": [4, 5]}).class_names == ("3", "rest")


def test_names_of_turns_are_not_taken_twice(train_digits: ImageTensors) -> None:
    with pytest.raises(UserError, match="are classes of the data set"):
        quarter_turns(quarter_turns(train_digits))
    assert ClassSubset(quarter_turns(train_digits), ["90°"]).class_names == ("90°",)


def test_only_square_images_turn() -> None:
    wide = ImageTensors(
        torch.zeros(2, 1, 4, 6), torch.zeros(2), class_names=["a"], mean=[0], std=[1]
    )
    with pytest.raises(UserError, match="4x6 pixels"):
        quarter_turns(wide)
