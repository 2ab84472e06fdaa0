"""Laws of merge and unmerge matrices, on features whose covariance is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusion.merging.zipping import Basis, canonical, greedy_clusters, merged_variance, of_clusters

SIZE, NETWORKS = 12, 3


@pytest.fixture(scope="module")
def units() -> Tensor:
    """Units of three networks that share directions, (networks·SIZE, samples)."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(SIZE, 600, generator=generator, dtype=torch.float64)
    mixed = [
        torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) @ common
        + torch.randn(SIZE, 600, generator=generator, dtype=torch.float64)
        for _ in range(NETWORKS)
    ]
    scale = 0.2 + torch.rand(NETWORKS * SIZE, 1, generator=generator, dtype=torch.float64)
    return torch.cat(mixed) * scale


def bases(correlation: Tensor) -> dict[str, Basis]:
    clusters = greedy_clusters(correlation, NETWORKS, within_budget=0.3, repeat_factor=0.5)
    return {
        "zip": of_clusters(clusters, correlation),
        "cca": canonical(correlation, NETWORKS, 0),
    }


@pytest.mark.parametrize("kind", ["zip", "cca"])
def test_what_is_read_out_merges_to_itself(units, kind) -> None:
    r"""M U = I; so U M is a projection."""
    basis = bases(units.corrcoef())[kind]
    identity = torch.einsum("nij,njk->ik", basis.merge, basis.unmerge)
    torch.testing.assert_close(identity, torch.eye(SIZE, dtype=torch.float64))
    wide, tall = basis.merge.transpose(0, 1).flatten(1), basis.unmerge.flatten(0, 1)
    torch.testing.assert_close(tall @ wide @ tall @ wide, tall @ wide)


@pytest.mark.parametrize("kind", ["zip", "cca"])
def test_the_variance_is_that_of_the_merged_features(units, kind) -> None:
    basis = bases(units.corrcoef())[kind]
    variance = units.var(1, correction=0).view(NETWORKS, SIZE)
    features = basis.merge.transpose(0, 1).flatten(1) @ units
    expected = features.var(1, correction=0)
    torch.testing.assert_close(merged_variance(basis, variance), expected)


def test_variances_go_by_the_square_of_the_merge_matrix() -> None:
    """Of units that do not correlate, and of copies; and twice the map is four times as much."""
    clusters = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3]])
    variance = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 6.0, 7.0]])
    alone = of_clusters(clusters, torch.eye(8, dtype=torch.float64))
    squares = (alone.merge.square() * variance.double()[:, None, :]).sum((0, 2))
    torch.testing.assert_close(merged_variance(alone, variance), squares)
    doubled = Basis(2 * alone.merge, alone.unmerge / 2, alone.correlation)
    torch.testing.assert_close(merged_variance(doubled, variance), 4 * squares)
    copies = of_clusters(
        torch.arange(4).expand(2, -1), torch.eye(4, dtype=torch.float64).repeat(2, 2)
    )
    same = variance[:1].expand(2, -1)
    torch.testing.assert_close(merged_variance(copies, same), variance[0].double())


def test_canonical_correlation_finds_any_linear_map(units) -> None:
    """Features that are a rotation of the reference's are read as the reference's."""
    reference = units[:SIZE] / units[:SIZE].std(1, correction=0, keepdim=True)
    values, vectors = torch.linalg.eigh(reference.corrcoef())
    white = (vectors / values.sqrt()) @ vectors.T @ (reference - reference.mean(1, keepdim=True))
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0]
    both = torch.cat([white, turn @ white])
    basis = canonical(both.corrcoef(), 2, 0, ridge=1e-9)
    # The features of both have unit variance, so that nothing else but the rotation is between.
    torch.testing.assert_close(2 * basis.merge[1], turn.T, rtol=1e-4, atol=1e-4)
    assert basis.explained() == pytest.approx(1, abs=1e-5)


def test_copies_are_explained_wholly_and_strangers_are_not() -> None:
    strangers = torch.randn(2 * SIZE, 2000, dtype=torch.float64).corrcoef()
    same = torch.arange(SIZE).expand(2, -1)
    copies = torch.eye(SIZE, dtype=torch.float64).repeat(2, 2)
    assert of_clusters(same, copies).explained() == pytest.approx(1)
    assert of_clusters(same, strangers).explained() == pytest.approx(0.5**0.5, abs=0.05)
