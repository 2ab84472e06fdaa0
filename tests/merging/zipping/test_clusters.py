"""Laws of the greedy clusters: what is merged, how much within a network, in whatever order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion.merging.zipping import greedy_clusters

SIZE = 24


def features(networks: int, seed: int = 0) -> Tensor:
    """Units of which some are near one of a few common directions, (networks·SIZE, samples)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SIZE // 2, 400, generator=generator)
    which = torch.randint(len(common), (networks * SIZE,), generator=generator)
    return common[which] + 0.8 * torch.randn(len(which), 400, generator=generator)


def members(clusters: Tensor) -> Tensor:
    """How many units of each network are in each cluster, (networks, clusters)."""
    return torch.stack([row.bincount(minlength=SIZE) for row in clusters])


def test_permuted_copies_are_paired() -> None:
    one = features(1)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    found = greedy_clusters(torch.cat([one, one[order]]).double().corrcoef(), 2)
    assert sorted(found[0].tolist()) == list(range(SIZE))
    assert torch.equal(found[1], found[0][order])


@pytest.mark.parametrize("networks", [2, 3, 4])
def test_there_are_as_many_clusters_as_units_and_none_is_empty(networks: int) -> None:
    correlation = features(networks).double().corrcoef()
    for budget, factor in ((0.0, 1.0), (0.25, 0.5), (1.0, 0.0)):
        found = greedy_clusters(correlation, networks, within_budget=budget, repeat_factor=factor)
        assert sorted(set(found.flatten().tolist())) == list(range(SIZE))


def test_without_a_budget_a_cluster_has_one_unit_of_each_of_two_networks() -> None:
    found = greedy_clusters(features(2).double().corrcoef(), 2)
    assert (members(found) == 1).all()


@pytest.mark.parametrize("budget", [0.125, 0.5])
def test_the_budget_bounds_the_merges_within_each_network(budget: float) -> None:
    correlation = features(2).double().corrcoef()
    counts = members(greedy_clusters(correlation, 2, within_budget=budget))
    within = (counts - 1).clamp(min=0).sum(1)
    assert (within <= budget * SIZE).all()
    assert within.sum() > 0, "the budget is used, where units of one network are near copies"


def test_a_small_factor_keeps_clusters_small() -> None:
    correlation = features(2).double().corrcoef()
    largest = [
        members(greedy_clusters(correlation, 2, within_budget=1.0, repeat_factor=f)).sum(0).max()
        for f in (1.0, 0.05)
    ]
    assert largest[1] < largest[0]


def test_the_order_of_the_networks_does_not_matter() -> None:
    every = features(3)
    turned = torch.cat([every[2 * SIZE :], every[: 2 * SIZE]])
    one = greedy_clusters(every.double().corrcoef(), 3, within_budget=0.25, repeat_factor=0.5)
    other = greedy_clusters(turned.double().corrcoef(), 3, within_budget=0.25, repeat_factor=0.5)
    other = other.roll(-1, 0)

    def together(clusters: Tensor) -> Tensor:
        flat = clusters.flatten()
        return flat[:, None] == flat[None, :]

    assert torch.equal(together(one), together(other))


def test_equally_correlated_units_stay_at_their_place() -> None:
    found = greedy_clusters(torch.ones(2 * SIZE, 2 * SIZE), 2)
    assert torch.equal(found[0], found[1])
