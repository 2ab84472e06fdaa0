"""TIES against the paper's rules, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fusion.errors import UserError
from fusion.weights import ties, trim
from fusion.weights.ties_merging import without_smaller

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])


def merged_change(*changes, **options):
    return ties(BASE, [BASE + torch.tensor(c) for c in changes], **options) - BASE


def test_the_sign_with_more_mass_wins_and_the_others_are_silent():
    a, b, c = [3.0, 1.0, 0.0, 1.0, 2.0], [-1.0, -2.0, 0.0, 0.0, 2.0], [-1.0, 0.5, 4.0, 0.0, 4.0]
    expected = torch.tensor([3.0, -2.0, 4.0, 1.0, 8 / 3])
    assert_close(merged_change(a, b, c, density=1.0), expected)


def test_weights_vote_and_average():
    a, b = [1.0, 2.0, 2.0, 0.0, 0.0], [-2.0, -1.0, 6.0, 0.0, 0.0]
    weighted = merged_change(a, b, density=1.0, weights=[3, 1])
    assert_close(weighted, torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]))


def test_a_drawn_vote_leaves_the_base():
    assert_close(merged_change([2.0] * 5, [-2.0] * 5, density=1.0), torch.zeros(5))


def test_small_changes_are_trimmed_from_each_tensor_alone():
    a, b = [5.0, 1.0, 0.1, 0.1, 0.1], [0.01, 0.01, 0.01, 0.5, 0.3]
    change = merged_change(a, b, density=0.4)
    assert_close(change, torch.tensor([5.0, 1.0, 0.0, 0.5, 0.3]))


def test_scale_multiplies_the_merged_change():
    change = merged_change([1.0, 2.0, 0.0, 0.0, 0.0], density=1.0, scale=0.3)
    assert_close(change, torch.tensor([0.3, 0.6, 0.0, 0.0, 0.0]))


def test_negated_changes_merge_to_the_negated_change(make):
    base = torch.zeros(6, 4, 3, 3)
    changes = [make(seed) for seed in range(3)]
    merged = ties(base, changes, density=0.5)
    assert_close(ties(base, [-c for c in changes], density=0.5), -merged)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 216), (0.5, 108), (0.101, 22), (1e-9, 1)])
def test_trim_keeps_the_share_that_was_asked_for(density, kept, make):
    change = make(0)
    trimmed = trim(change, density)
    assert int((trimmed != 0).sum()) == kept
    assert trimmed.abs().max() == change.abs().max()


def test_trim_keeps_all_entries_at_the_threshold():
    change = torch.tensor([1.0, -1.0, 1.0, 0.5])
    assert_close(trim(change, 0.25), torch.tensor([1.0, -1.0, 1.0, 0.0]))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_the_density_is_a_share(density):
    with pytest.raises(UserError, match="density"):
        ties(BASE, [BASE], density=density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_at_a_threshold_are_kept_to_the_last_bit(dtype, make):
    change = make(0, dtype=dtype).flatten()
    for threshold in [0.0, *change[:9].abs().tolist()]:
        kept = without_smaller(change, threshold)
        assert torch.equal(kept, torch.where(change.abs() >= threshold, change, 0))
