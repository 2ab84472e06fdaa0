from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fusion.data.randomness import own_random_numbers, seed_global_generators


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


def test_generators_continue_where_they_were() -> None:
    with own_random_numbers():
        expected = draw()

    def fail() -> None:
        with own_random_numbers():
            seed_global_generators(2**63 - 1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


def test_a_seed_decides_all_three() -> None:
    with own_random_numbers():
        seed_global_generators(5)
        first = draw()
        seed_global_generators(6)
        assert all(one != other for one, other in zip(draw(), first, strict=True))
        seed_global_generators(5)
        assert draw() == first
