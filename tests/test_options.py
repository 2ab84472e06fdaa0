"""Constructors are held to their annotations, from Python as from YAML."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

import fusion
from fusion import options as words
from fusion.annotations import annotations_of, misfit
from fusion.errors import UserError
from fusion.merging.rule import Rule
from fusion.merging.rules import Mean, Ties
from fusion.method import SNRSelectiveMerge
from fusion.options import (
    Classes,
    Count,
    FilePath,
    Fraction,
    ImageShape,
    Positive,
    Seed,
    Share,
    TargetMapping,
    checked,
)
from fusion.target import build

if TYPE_CHECKING:
    from nowhere import Ghost

Colour = Literal["red", "green"]


ODD: Any = None  # a default that is not what its annotation says, as in much foreign code


class Weights(Enum):
    DEFAULT = 1


FITS = [
    (0, Share), (1, Share), (0.5, Fraction), (1, Fraction), (7, Positive), (-3.5, float),
    (np.float32(0.5), Share), (np.int64(3), Count), (2**63 - 1, Seed), (0, Seed),
    (True, bool), ("", str), (Path("x"), FilePath), ("x", FilePath), (None, Count | None),
    ("red", Colour), ("red", Colour | None), (None, Colour | None), (3, Literal[1, 3]),
    ([1, 2], Sequence[int]), ((1, 2), Sequence[float]), ([1, 2], tuple[int, ...]),
    ([1, "a"], tuple[int, str]), ([0, "cat"], Classes), ([3, 8, 8], ImageShape),
    (range(3), Sequence[int]), (np.ones(2), Sequence[float]), ({1, 2}, Sequence[int]),
    ({"a": 1.0}, Mapping[str, float]), ({}, Mapping[str, float]), ({}, dict),
    ({"_target_": "x"}, TargetMapping), (len, Callable[[list[int]], int]), (int, type),
    (Mean(), Rule), (torch.zeros(3), torch.Tensor), (object(), Dataset[Any]),
    ("DEFAULT", Weights), (Weights.DEFAULT, Weights), (3, Any), ("x", object), (3, "unread"),
]  # fmt: skip
MISFITS = [
    (1.01, Share, "X.k is 1.01; give a number from 0 to 1"),
    (0, Fraction, "X.k is 0; give a number above 0 and up to 1"),
    (-1, Positive, "X.k is -1; give a number above 0"),
    (math.nan, float, "X.k is nan; give a finite number"),
    (math.inf, Positive, "X.k is inf; give a finite number above 0"),
    (10**400, float, "X.k is a number of 401 digits; give a finite number"),
    (10**9999, Count, "X.k is a number of 10000 digits; give a whole number from 1 to 92233720368"),
    (2**63, Seed, "X.k is 9223372036854775808; give a whole number from 0 to 9223372036854775807"),
    (-1, Seed, "X.k is -1; give a whole number of 0 or more"),
    (1e9, Count, "X.k is 1000000000.0; give a whole number of 1 or more, written 1000000000"),
    (True, int, "X.k is true; give a whole number"),
    (False, Share, "X.k is false; give a number from 0 to 1"),
    ("0.1", Share, "X.k is '0.1'; give a number from 0 to 1"),
    ("true", bool, "X.k is 'true'; give true or false"),
    (1, bool, "X.k is 1; give true or false"),
    (None, Count, "X.k is null; give a whole number of 1 or more"),
    (0, Count | None, "X.k is 0; give a whole number of 1 or more, or null"),
    ("gren", Colour, "X.k is 'gren'; give red or green; did you mean 'green'?"),
    (3, Colour | None, "X.k is 3; give red, green or null"),
    (["red"], Colour, r"X.k is \['red'\]; give red or green"),
    (True, Literal[1, 3], "X.k is true; give 1 or 3"),
    (3, str, "X.k is 3; give text"),
    (3, FilePath | None, "X.k is 3; give a path that is not empty, or null"),
    ("", FilePath, "X.k is ''; give a path that is not empty"),
    ("ab", Sequence[str], "X.k is 'ab'; give a list of text"),
    ([1, "x"], Sequence[float] | Mapping[str, float], r"X.k\[1\] is 'x'; give a number"),
    ({"a": [1, None]}, Mapping[str, Sequence[int]], r"X.k.a\[1\] is null; give a whole number"),
    ({1: 2}, Mapping[str, int], "X.k, a name in it, is 1; give text"),
    ([1], tuple[int, int], r"X.k is \[1\]; give a list of whole numbers"),
    ([], Classes, r"X.k is \[\]; give a non-empty list of whole numbers or text"),
    ([3, 8], ImageShape, r"X.k is \[3, 8\]; give a list of 3 whole numbers of 1 or more"),
    ({}, TargetMapping, "X.k is {}; give a mapping with _target_"),
    (3, Callable[[], int], "X.k is 3; give a function"),
    (3, Rule, "X.k is 3; give a Rule, or a mapping with _target_"),
    (torch.zeros(3), Rule, "X.k is of type Tensor; give a Rule"),
    ([(1, 2)], Dataset[Any], r"X.k is \[\(1, 2\)\]; give a Dataset, or a mapping with _target_"),
    ("x" * 999, int, "X.k is 'xxxxx.{10,70}; give a whole number"),
    ([[[[1]]]] * 9999, int, "X.k is .{10,90}; give a whole number"),
]


def named(value: object) -> str:
    """A name without an address, which differs between the workers of pytest."""
    return str(value).partition(" at 0x")[0]


@pytest.mark.parametrize(("value", "annotation"), FITS, ids=named)
def test_what_an_annotation_allows(value, annotation) -> None:
    assert misfit(value, annotation) is None


@pytest.mark.parametrize(("value", "annotation", "said"), MISFITS, ids=range(len(MISFITS)))
def test_what_it_does_not_is_told_with_the_value_and_the_cure(value, annotation, said) -> None:
    wrong = misfit(value, annotation)
    assert wrong is not None

    assert re.match(said, wrong.sentence("X.k"))


@checked
def paint(colour: Colour, /, *more: int, share: Share = 0.5, odd: int = ODD, ghost: Ghost = 3):
    return colour, more, share, odd, ghost


def test_a_function_is_held_to_its_annotations() -> None:
    assert paint("red", 1, 2, share=1) == ("red", (1, 2), 1, None, 3)
    assert paint("red", odd=None) == ("red", (), 0.5, None, 3)  # the default is always right
    assert paint("red", ghost="anything")[-1] == "anything"  # imported for type checkers only
    with pytest.raises(UserError, match=r"paint\.colour is 'rad'; give red or green; did you"):
        paint("rad")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        paint()
    assert list(inspect.signature(paint).parameters) == ["colour", "more", "share", "odd", "ghost"]


@checked
@dataclass(frozen=True)
class Painter:
    share: Share = 0.5


class Apprentice(Painter):
    """Inherits the constructor, and is named by its own name."""


def test_a_data_class_is_held_to_its_fields_and_so_is_what_inherits_it() -> None:
    assert Painter(1).share == 1
    for maker in (Painter, Apprentice):
        with pytest.raises(UserError, match=f"{maker.__name__}.share is 2; give a number"):
            maker(share=2)


@pytest.mark.parametrize(
    ("kind", "option", "value"), [(SNRSelectiveMerge, "top_p", 2), (Ties, "density", 0)]
)
def test_python_and_yaml_say_the_same(kind, option, value) -> None:
    with pytest.raises(UserError) as from_python:
        kind(**{option: value})
    with pytest.raises(UserError) as from_yaml:
        build({"_target_": f"{kind.__module__}.{kind.__name__}", option: value})
    assert str(from_python.value) == str(from_yaml.value)


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(fusion.__path__, "fusion."):
        if found.name != "fusion.__main__":
            yield importlib.import_module(found.name)


def test_every_annotation_of_what_is_checked_can_be_read() -> None:
    """A name that cannot be resolved would switch the check of that option off unseen."""
    read = 0
    for module in modules():
        for name, value in vars(module).items():
            target = value.__init__ if isinstance(value, type) else value
            here = getattr(value, "__module__", None) == module.__name__
            if not here or not inspect.isfunction(
                inspect.unwrap(target) if callable(target) else 0
            ):
                continue
            if not hasattr(target, "__wrapped__") or name.startswith("_"):
                continue
            annotations = annotations_of(value)
            for option, parameter in inspect.signature(value).parameters.items():
                written = str(parameter.annotation)
                read += 1
                assert annotations[option] is not Any or written in ("Any", "Fabric | None"), (
                    name,
                    option,
                    written,
                )
    assert read > 150


def test_the_example_runs() -> None:
    assert doctest.testmod(words).failed == 0


def test_ranges_are_annotations_that_type_checkers_read() -> None:
    assert Annotated[int, words.Within(least=1, most=words.LARGEST)] == Count


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ANNOTATIONS = st.sampled_from(
    [
        None, bool, int, float, str, Count, Positive, Fraction, Seed, Share, FilePath, ImageShape,
        Classes, TargetMapping, Literal["a", "b"], Sequence[int], Mapping[str, float], int | None,
        Sequence[Count] | Mapping[str, float] | None,
    ]
)  # fmt: skip


@given(value=PLAIN, annotation=ANNOTATIONS)
def test_any_value_fits_or_is_refused_in_a_sentence(value: object, annotation: Any) -> None:
    found = misfit(value, annotation)
    if found is None:
        if annotation in (bool, int, str, None):
            assert type(value) is (type(None) if annotation is None else annotation)
        if annotation in (Count, Seed):
            assert isinstance(value, int)
            assert value >= 0
        if annotation in (float, Positive, Fraction, Share):
            assert isinstance(value, int | float)
            assert math.isfinite(value)
        return
    sentence = found.sentence("option")
    assert sentence.startswith("option")
    assert "\n" not in sentence
    assert "give " in sentence


@given(values=st.lists(PLAIN, max_size=4), annotation=ANNOTATIONS)
def test_a_list_fits_if_each_of_its_entries_does(values: list[object], annotation: Any) -> None:
    whole = misfit(values, Sequence[annotation])
    entries = [misfit(value, annotation) for value in values]
    assert (whole is None) == all(entry is None for entry in entries)
