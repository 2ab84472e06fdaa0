from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from fusion.merging.layer_scores import (
    LayerRecord,
    change_statistics,
    select_top,
    select_top_ascending,
    share_count,
    shares,
    weight_matrix,
)
from fusion.models import Layer


def record(name: str, score: float, *, is_head: bool = False) -> LayerRecord:
    layer = Layer(name, f"{name}.weight", (f"{name}.weight",), 1, "conv", ())
    return LayerRecord(layer, (1,), is_head=is_head, score=score)


def chosen(records: list[LayerRecord]) -> list[str]:
    return [r.layer.name for r in records if r.selected]


def test_the_count_is_the_exact_ceiling() -> None:
    """Also where the rounded product lies above a whole number: 0.07 · 100 is 7.000000000000001."""
    for hundredth, layers in itertools.product(range(101), range(1, 121)):
        exact = math.ceil(Fraction(hundredth, 100) * layers)
        assert share_count(hundredth / 100, layers) == exact, (hundredth, layers)


def test_the_best_are_selected_and_the_head_is_no_candidate() -> None:
    records = [record("a", 1.0), record("b", 3.0), record("h", 9.0, is_head=True), record("c", 2.0)]
    select_top(records, 0.5)
    assert chosen(records) == ["b", "c"]
    assert [r.rank for r in records] == [3, 1, None, 2]


def test_among_equals_the_earlier_wins_and_in_the_notebook_the_later() -> None:
    names = "abcd"
    records = [record(name, 1.0) for name in names]
    select_top(records, 0.5)
    assert chosen(records) == ["a", "b"]
    records = [record(name, 1.0) for name in names]
    select_top_ascending(records, 0.5)
    assert chosen(records) == ["c", "d"]


def test_what_is_not_a_number_comes_last() -> None:
    records = [record("a", math.nan), record("b", -1.0), record("c", 0.0)]
    select_top(records, 0.6)
    assert chosen(records) == ["b", "c"]


def test_shares_sum_to_one_and_are_equal_where_all_are_zero() -> None:
    assert shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert shares({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}


def test_changes_are_compared_by_direction_and_size() -> None:
    base = torch.tensor([3.0, 4.0], dtype=torch.float64)
    one, other = base + torch.tensor([1.0, 0.0]), base + torch.tensor([1.0, 1.0])
    similarity, size = change_statistics(base, [one, other])
    assert similarity == pytest.approx(math.sqrt(0.5))
    assert size == pytest.approx((1 + math.sqrt(2)) / 2 / 5)
    assert math.isnan(change_statistics(base, [one])[0])
    assert math.isnan(change_statistics(base, [one, base])[0])
    assert math.isnan(change_statistics(torch.zeros_like(base), [one, other])[1])


def test_output_units_come_first() -> None:
    weight = torch.rand(2, 5, 3, 3)
    conv = Layer("c", "c.weight", ("c.weight",), 1, "conv", ())
    transposed = Layer("c", "c.weight", ("c.weight",), 1, "conv_transpose", ())
    assert weight_matrix(weight, conv) is weight
    assert weight_matrix(weight, transposed).shape == (5, 2, 3, 3)
