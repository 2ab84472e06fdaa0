"""Classes are told apart by name, by original label where there are no names, never by position."""

from __future__ import annotations

import pytest

from fusion.data import ClassSubset, digits, grouped, label_space
from fusion.errors import UserError
from fusion.labels import LabelSpace, joint_space

PETS, FLOWERS = LabelSpace.of(["cat", "dog"]), LabelSpace.of(["rose", "tulip"])


def test_names_decide_where_both_sides_have_them() -> None:
    one = LabelSpace((0, 1), ("cat", "dog"))
    other = LabelSpace((0, 1), ("rose", "tulip"))  # the same numbers, another meaning
    assert not one.covers(other)
    assert one.is_disjoint(other)
    assert one.equals(LabelSpace((7, 3), ("cat", "dog")))
    assert one.positions(LabelSpace.of(["dog", "cat"])) == [1, 0]


def test_labels_decide_where_one_side_has_no_names() -> None:
    named, bare = LabelSpace((4, 9), ("four", "nine")), LabelSpace.of([9])
    assert named.positions(bare) == [1]
    assert bare.positions(named) is None


def test_labels_without_names_mean_nothing_across_two_tasks() -> None:
    one, other = LabelSpace.of([0, 1], task="pets"), LabelSpace.of([0, 1], task="flowers")
    assert not one.covers(other)
    assert one.covers(LabelSpace.of([0]))  # nobody said that this is another task


def test_a_space_of_names_and_one_of_labels_are_not_comparable() -> None:
    assert not PETS.covers(LabelSpace.of([0]))
    assert PETS.is_disjoint(LabelSpace.of([0]))


def test_a_data_set_says_what_its_classes_are() -> None:
    data = digits("val")
    assert label_space(data) == LabelSpace(tuple(range(10)), tuple(map(str, range(10))))
    part = label_space(ClassSubset(data, [7, 2]))
    assert part == LabelSpace((7, 2), ("7", "2"))
    parity = label_space(grouped(data, {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}))
    assert parity is not None
    assert parity.names == ("even", "odd")
    assert parity.is_disjoint(part)
    assert label_space([1, 2]) is None


def test_the_joint_space_has_the_classes_of_all_tasks() -> None:
    joint = joint_space([PETS, FLOWERS])
    assert joint is not None
    assert joint.names == ("cat", "dog", "rose", "tulip")
    assert joint.positions(FLOWERS) == [2, 3]
    assert joint_space([PETS, LabelSpace.of(["dog", "rose"])]) is None


def test_what_is_written_comes_back() -> None:
    for space in (PETS, LabelSpace((3, 1), ("a", "b"), "task"), LabelSpace.of([5])):
        assert LabelSpace.from_json(space.to_json()) == space


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "{}", '{"labels": ["a"], "names": null, "task": null}', '{"labels": [true]}'],
)
def test_what_others_wrote_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the classes are not written as"):
        LabelSpace.from_json(text)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([], "give a list of class names"),
        ("cat", "give a list of class names"),
        (["cat", 1], "mixes kinds"),
        ([True], "mixes kinds"),
        ([1, 1], "a class stands twice"),
    ],
)
def test_no_list_of_classes(classes: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        LabelSpace.of(classes)  # type: ignore[arg-type]
