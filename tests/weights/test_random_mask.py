"""Masks that depend on a seed and a position."""

from __future__ import annotations

import pytest
import torch

from fusion.weights.random_mask import random_mask


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 1000, 1021])
def test_the_mask_of_a_part_is_that_part_of_the_mask(start) -> None:
    whole = random_mask(1200, 0.3, seed=5)
    for count in (1, 8, 100):
        part = random_mask(count, 0.3, seed=5, start=start)
        assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_density_is_kept(density) -> None:
    mask = random_mask(40_000, density, seed=2**63 - 1)
    assert float(mask.float().mean()) == pytest.approx(density, abs=0.01)


def test_seeds_are_independent() -> None:
    one, two = (random_mask(40_000, 0.5, seed=seed) for seed in (0, 1))
    assert float((one & two).float().mean()) == pytest.approx(0.25, abs=0.01)
