"""The exact k-th largest of a stream of numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fusion.weights import trim
from fusion.weights.largest import kth_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.5, 0.97, 1.0])
def test_it_is_the_number_that_sorting_finds(dtype, density, make) -> None:
    blocks = [
        make(0, 3, 500, dtype=dtype).abs(),
        make(1, 3, 20, 10, dtype=dtype).abs() * 1e-30,
        1e-42 * make(2, 3, 50, dtype=dtype).abs(),  # denormal in float32
        torch.zeros(3, 40, dtype=dtype),
        torch.full((3, 10), 2.0, dtype=dtype),
    ]
    together = torch.cat([block.flatten(1) for block in blocks], dim=1)
    k = math.ceil(density * together.shape[1])
    expected = together.sort(descending=True).values[:, k - 1].double().tolist()
    assert kth_largest(lambda: iter(blocks), density) == expected


def test_blocks_of_both_precisions_are_compared_exactly(make) -> None:
    blocks = [make(0, 2, 300).abs(), make(1, 2, 300, dtype=torch.float64).abs()]
    together = torch.cat([block.double() for block in blocks], dim=1)
    expected = together.sort(descending=True).values[:, 149].tolist()
    assert kth_largest(lambda: iter(blocks), 0.25) == expected


def test_it_agrees_with_trimming_one_tensor(make) -> None:
    change = make(0, 1, 999)
    (threshold,) = kth_largest(lambda: iter([change.abs()]), 0.123)
    assert torch.equal(torch.where(change.abs() >= threshold, change, 0), trim(change, 0.123))


def test_float32_takes_two_walks_and_nothing_takes_none(make) -> None:
    walks = []

    def blocks():
        walks.append(len(walks))
        yield make(0, 2, 100).abs()

    kth_largest(blocks, 0.5)
    assert len(walks) == 2
    assert kth_largest(lambda: iter([]), 0.5) == []
