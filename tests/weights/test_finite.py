"""Which tensors are finite."""

from __future__ import annotations

import pytest
import torch

from fusion.weights import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_entries_are_finite_though_their_sum_is_not(dtype):
    largest = torch.finfo(dtype).max
    assert is_finite(torch.full((9,), largest, dtype=dtype))
    assert is_finite(torch.tensor([largest, largest, -largest, -largest], dtype=dtype))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
def test_one_wrong_entry_is_found(wrong, dtype):
    tensor = torch.zeros(1000, dtype=dtype)
    tensor[777] = wrong
    assert not is_finite(tensor)


def test_opposite_infinities_are_not_finite():
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))


def test_integers_and_empty_tensors_are_finite():
    assert is_finite(torch.tensor([2**62]))
    assert is_finite(torch.empty(0))
