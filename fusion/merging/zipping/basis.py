"""The common basis of a group of units: its merge and unmerge matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.alignment.assignment import best_assignment

# Keeps units in place for which the features have no information.
STAY = 1e-6
SPARSE = 20  # from one entry in so many on, a sparse product is faster


@dataclass(frozen=True, eq=False)
class Basis:
    r"""Merge matrix M and unmerge matrix U of one group, in float64 on the CPU.

    .. math::
        z = \sum_i M_i x_i, \qquad x_i \approx U_i z, \qquad \sum_i M_i U_i = I

    Attributes:
        merge: (networks, size, size); its blocks side by side are M, size × networks·size.
        unmerge: (networks, size, size); its blocks one above the other are U.
        correlation: (networks·size, networks·size), of all units of all networks.
    """

    merge: Tensor
    unmerge: Tensor
    correlation: Tensor

    @property
    def networks(self) -> int:
        """Number of merged networks."""
        return len(self.merge)

    def explained(self) -> float:
        """Return the mean correlation of a unit with its readout, 1 at most.

        A feature that does not vary explains nothing.
        """
        merge, read = _wide(self.merge), self.unmerge.flatten(0, 1)
        with_units = _times(merge, self.correlation)  # covariance of features and units
        of_features = _times(merge, with_units.T).T
        variance = (_times(read, of_features) * read).sum(1)
        covariance = (read * with_units.T).sum(1)
        varies = variance > 1e-12
        return float(torch.where(varies, covariance / variance.clamp(min=1e-12).sqrt(), 0).mean())


def merged_variance(basis: Basis, variance: Tensor) -> Tensor:
    r"""Return the variances of the merged features.

    Means are linear in the merge matrix, variances are quadratic:

    .. math::
        \operatorname{Var}[z_c] = \sum_{j,l} M_{cj} M_{cl}\, \rho_{jl}\, \sigma_j \sigma_l,

    which is :math:`\sum_j M_{cj}^2 \sigma_j^2` for units that do not correlate, and the variance
    itself for units that are copies.

    Args:
        basis: the basis, with the correlations ρ.
        variance: (networks, size) σ².

    Returns:
        (size,) float64.
    """
    weighted = _wide(basis.merge) * variance.double().clamp(min=0).sqrt().flatten()
    return (_times(weighted, basis.correlation) * weighted).sum(1).clamp(min=0)


def of_clusters(clusters: Tensor, correlation: Tensor) -> Basis:
    """Return the basis whose features are the means of clusters of units (ZipIt).

    Args:
        clusters: (networks, size) int64, the cluster of each unit, each of which has at least one.
        correlation: see :class:`Basis`.
    """
    unmerge = F.one_hot(clusters, clusters.shape[1]).double()
    counts = unmerge.sum((0, 1))
    return Basis((unmerge / counts).transpose(1, 2), unmerge, correlation)


def of_permutations(order: Tensor, correlation: Tensor) -> Basis:
    """Return the basis of the mean of networks in one order of their units.

    Args:
        order: (networks, size) int64; place p of network i holds the unit that was at ``order[i,
            p]``.
        correlation: see :class:`Basis`.
    """
    return of_clusters(order.argsort(1), correlation)


def of_reference(networks: int, size: int, correlation: Tensor | None = None) -> Basis:
    """Return the basis that averages units at the same place; without features they are copies."""
    same = torch.arange(size).expand(networks, -1)
    if correlation is None:
        correlation = torch.eye(size, dtype=torch.float64).repeat(networks, networks)
    return of_permutations(same, correlation)


def assigned(correlation: Tensor, networks: int, reference: int) -> Tensor:
    """Return the order in which each network's units correlate best with the reference's.

    Args:
        correlation: (m·size, m·size) of m networks, the merged ones first.
        networks: how many of them are merged.
        reference: number of the network to whose units the others are assigned.

    Returns:
        (networks, size) int64.
    """
    size = _size(correlation, networks, reference)
    there = slice(reference * size, (reference + 1) * size)
    return torch.stack([
        best_assignment(correlation[there, i * size : (i + 1) * size]) for i in range(networks)
    ])  # fmt: skip


def canonical(correlation: Tensor, networks: int, reference: int, *, ridge: float = 0.1) -> Basis:
    r"""Return the basis of canonical correlation analysis, in the reference's coordinates.

    With the features standardised, :math:`C_{ri}` their correlation between the reference r and
    network i, and the whitened :math:`K_i = C_{rr}^{-1/2} C_{ri} C_{ii}^{-1/2} = P S Q^T`,

    .. math::
        T_i = C_{rr}^{1/2} P Q^T C_{ii}^{-1/2}, \qquad M_i = T_i / n, \qquad U_i = T_i^{-1}

    Source: CCA Merge (Horoi et al., 2024, arXiv 2407.05385), equation 5; there for two networks
    and by the covariance. Directions in which nothing varies stay in place.

    Args:
        correlation: (m·size, m·size) of m networks, the merged ones first.
        networks: how many of them are merged.
        reference: number of the network in whose coordinates the merged features are.
        ridge: added to the eigenvalues of C_rr and C_ii, whose mean is 1: 0.1 or so where there are
            few images. A large one makes the maps orthogonal (Procrustes).
    """
    size = _size(correlation, networks, reference)
    blocks = correlation.view(correlation.shape[0] // size, size, -1, size).transpose(1, 2)
    root, inverse = _roots(blocks[reference, reference], ridge)
    transforms, back = [], []
    for i in range(networks):
        if i == reference:
            transforms.append(torch.eye(size, dtype=torch.float64))
            back.append(torch.eye(size, dtype=torch.float64))
            continue
        own_root, own_inverse = _roots(blocks[i, i], ridge)
        whitened = inverse @ blocks[reference, i] @ own_inverse
        p, _, q = torch.linalg.svd(whitened + STAY * torch.eye(size, dtype=torch.float64))
        transforms.append(root @ p @ q @ own_inverse)
        back.append(own_root @ (p @ q).T @ inverse)
    merge = torch.stack(transforms) / networks
    merged = correlation[: networks * size, : networks * size]
    return Basis(merge, torch.stack(back), merged)


def _size(correlation: Tensor, networks: int, reference: int) -> int:
    """Return the number of units: the reference is a merged network, or the one behind them."""
    return len(correlation) // max(networks, reference + 1)


def _roots(correlation: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the square root of a correlation and its inverse."""
    values, vectors = torch.linalg.eigh(correlation)
    values = values.clamp(min=0) + ridge
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _wide(merge: Tensor) -> Tensor:
    """Return the merge matrix M, (size, networks·size)."""
    return merge.transpose(0, 1).flatten(1)


def _times(matrix: Tensor, other: Tensor) -> Tensor:
    """Return the product with a matrix that holds mostly zeros where units are clustered."""
    if matrix.count_nonzero() * SPARSE < matrix.numel():
        product: Tensor = torch.sparse.mm(matrix.to_sparse(), other)
        return product
    return matrix @ other
