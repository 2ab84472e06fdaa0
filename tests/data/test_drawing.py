from __future__ import annotations

import pytest
import torch

from fusion.data import ImageTensors, few
from fusion.errors import UserError


def test_a_stratified_draw_is_fair_and_a_larger_one_extends_it(
    train_digits: ImageTensors,
) -> None:
    small, large = few(train_digits, 37, seed=1), few(train_digits, 200, seed=1)
    counts = torch.bincount(small.labels, minlength=10)
    assert counts.max() - counts.min() == 1
    assert torch.equal(large.images[:37], small.images)


def test_seeds_draw_differently_and_repeatably(train_digits: ImageTensors) -> None:
    draws = [few(train_digits, 50, seed=seed, stratified=False) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].images, draws[1].images)
    assert not torch.equal(draws[0].images, draws[2].images)


def test_drawing_all_loses_and_repeats_none(numbered: ImageTensors) -> None:
    assert sorted(few(numbered, 99).images[:, 0, 0, 0].tolist()) == list(range(10))


def test_drawing_none_is_refused(numbered: ImageTensors) -> None:
    with pytest.raises(UserError, match=r"few\.n is 0"):
        few(numbered, 0)
