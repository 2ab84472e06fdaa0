"""Spectral rules where a plain singular value decomposition gives something arbitrary."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fusion.merging.rule import merge_tensor
from fusion.merging.rules import TSVM, WUDI, IsoC, IsoCTS

SPECTRAL = [TSVM(), IsoC(), IsoCTS(), IsoCTS(common_share=0.5)]
spectral = pytest.mark.parametrize("rule", SPECTRAL, ids=str)


def test_copies_merge_to_the_leading_components_of_their_change(normal) -> None:
    change = normal(8, 30, of="change")
    merged = merge_tensor(TSVM(), [change] * 4, torch.zeros(8, 30))
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    assert_close(merged, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)


def test_one_expert_is_returned_by_tsvm(normal) -> None:
    expert = normal(8, 30, of="expert")
    assert_close(merge_tensor(TSVM(), [expert], torch.zeros(8, 30)), expert, rtol=1e-4, atol=1e-5)


def test_tasks_in_directions_of_their_own_are_merged_whole() -> None:
    """TSVM keeps each task where the tasks do not meet."""
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)
    first[:3, :3], second[3:, 3:6] = torch.diag(torch.tensor([5.0, 4.0, 3.0])), 2 * torch.eye(3)
    merged = merge_tensor(TSVM(), [first, second], torch.zeros(6, 8))
    assert_close(merged, first + second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [IsoC(), IsoCTS(common_share=0.5)], ids=str)
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
def test_isotropic_spectra_are_flat(rule, shape, normal) -> None:
    experts = list(normal(3, *shape, of="experts"))
    merged = merge_tensor(rule, experts, torch.zeros(shape))
    values = torch.linalg.svdvals(merged)
    assert values.max() / values.min() < 1.001


@spectral
def test_low_rank_changes_stay_in_their_directions(rule, normal) -> None:
    """No direction comes in that no task has."""
    rows = normal(2, 10, of="rows")
    experts = list(normal(3, 20, 2, of="left") @ rows)
    merged = merge_tensor(rule, experts, torch.zeros(20, 10))
    basis = torch.linalg.qr(rows.T).Q
    assert_close(merged @ basis @ basis.T, merged, rtol=1e-4, atol=1e-4)
    assert merged.norm() > 0.5


@spectral
def test_tasks_that_cancel_out_leave_no_noise(rule, normal) -> None:
    change = normal(20, 30, of="change")
    merged = merge_tensor(rule, [change, -change], torch.zeros(20, 30))
    assert merged.isfinite().all()
    assert merged.norm() < 2 * change.norm()


@spectral
@pytest.mark.parametrize("shape", [(2, 30), (3, 4)], ids=str)
def test_there_may_be_more_experts_than_singular_values(rule, shape, normal) -> None:
    experts = list(normal(6, *shape, of="experts"))
    merged = merge_tensor(rule, experts, torch.zeros(shape))
    assert merged.isfinite().all()
    assert 0.1 < merged.norm() < sum(expert.norm() for expert in experts)


@pytest.mark.parametrize("ridge", [1e-6, 1.0])
def test_wudi_solves_the_smaller_of_two_systems(ridge, normal) -> None:
    """Rows of zeros make the system over outputs larger than the one over inputs."""
    experts = normal(2, 4, 20, of="experts")
    padded = torch.cat([experts, torch.zeros(2, 30, 20)], dim=1)
    merged = merge_tensor(WUDI(ridge=ridge), list(experts), torch.zeros(4, 20))
    other = merge_tensor(WUDI(ridge=ridge), list(padded), torch.zeros(34, 20))
    assert_close(other[:4], merged, rtol=1e-4, atol=1e-5)
    assert not other[4:].any()


def test_wudi_grows_with_its_task_vectors(normal) -> None:
    experts = normal(3, 6, 10, of="experts")
    merged = merge_tensor(WUDI(), list(experts), torch.zeros(6, 10))
    larger = merge_tensor(WUDI(), list(10 * experts), torch.zeros(6, 10))
    assert_close(larger, 10 * merged, rtol=1e-4, atol=1e-4)


def test_a_large_ridge_is_the_sum(normal) -> None:
    experts = normal(3, 6, 10, of="experts")
    merged = merge_tensor(WUDI(ridge=1e9), list(experts), torch.zeros(6, 10))
    assert_close(merged, experts.sum(0), rtol=1e-4, atol=1e-5)
