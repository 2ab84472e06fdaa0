"""The positions drawn for a pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion.weights.positions import draw_positions

SIZES = {"conv": 30, "norm": 3, "empty": 0, "head": 17}


@pytest.mark.parametrize("count", [1, 10, 24, 26, 49, 50, 80])
def test_as_many_distinct_positions_as_asked_for(count):
    positions = draw_positions(SIZES, count, seed=0)
    assert list(positions) == list(SIZES)
    assert sum(len(p) for p in positions.values()) == min(count, 50)
    for name, drawn in positions.items():
        assert drawn.dtype == torch.int64
        assert bool((drawn.diff() > 0).all())
        assert all(0 <= p < SIZES[name] for p in drawn)


def test_the_order_of_the_names_does_not_matter():
    backwards = draw_positions(dict(reversed(SIZES.items())), 20, seed=3)
    for name, drawn in draw_positions(SIZES, 20, seed=3).items():
        assert torch.equal(drawn, backwards[name])


def test_another_seed_draws_other_positions():
    drawn = [draw_positions({"w": 10**12}, 5, seed=seed)["w"] for seed in (0, 1)]
    assert not torch.equal(*drawn)
    assert int(drawn[0].max()) > 10**9


@pytest.mark.parametrize("count", [5, 35])
def test_every_position_is_equally_likely(count):
    hits = np.zeros(50)
    draws = 2000
    for seed in range(draws):
        positions = draw_positions({"a": 20, "b": 30}, count, seed=seed)
        hits[positions["a"]] += 1
        hits[20 + positions["b"].numpy()] += 1
    share = count / 50
    error = np.sqrt(share * (1 - share) / draws)
    assert np.abs(hits / draws - share).max() < 4.5 * error
