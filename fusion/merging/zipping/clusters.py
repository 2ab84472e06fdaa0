"""Greedy clusters of the most correlated units: ZipIt (Stoica et al., 2023)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of equally correlated units those at the same place are paired: a margin above rounding.
SAME_PLACE = 1e-6


def greedy_clusters(
    correlation: Tensor,
    networks: int,
    *,
    within_budget: float = 0.0,
    repeat_factor: float = 1.0,
) -> Tensor:
    """Return the cluster, of ``size`` clusters, of each unit of each network.

    All units start alone. The two clusters with the highest correlation are merged until as many
    clusters are left as one network has units; two clusters correlate as their least correlated
    pair of units does (ZipIt, arXiv 2305.03053, section 4 and Appendix: its α and β).

    The order of the networks does not matter, except for the numbers of the clusters and between
    pairs of exactly equal correlation; among those, units at the same place come first.

    Args:
        correlation: (networks·size, networks·size), the units of the first network first.
        networks: how many networks.
        within_budget: β: the share of a network's units that may be merged into another unit of the
            same network. 0: a cluster has at most one unit of each network. Where more than two
            networks leave no other merge (three clusters of different pairs of networks), the
            budget is exceeded.
        repeat_factor: α: each time a cluster grows, its positive correlations are multiplied by
            this, so that clusters stay small. 1 does not penalise growth.

    Returns:
        (networks, size) int64. Clusters are numbered by the smallest place of their units.
    """
    search = _Search(correlation, networks, within_budget, repeat_factor)
    while search.clusters > search.size:
        search.merge_best()
    return search.numbers()


class _Search:
    def __init__(
        self, correlation: Tensor, networks: int, within_budget: float, repeat_factor: float
    ) -> None:
        count = len(correlation)
        self.size = count // networks
        self.clusters = count
        self.factor = repeat_factor
        place, self.owner = np.arange(count) % self.size, np.arange(count) // self.size
        self.label = np.arange(count)
        self.similar: NDArray[np.float64] = correlation.cpu().double().numpy().copy()
        self.similar += SAME_PLACE * (place[:, None] == place[None, :])
        self.similar[np.arange(count), np.arange(count)] = -np.inf
        self.inside: NDArray[np.bool_] = self.owner[:, None] == np.arange(networks)[None, :]
        self.budget = np.full(networks, int(within_budget * self.size + 1e-9))
        self.alive = np.ones(count, dtype=bool)
        self.favourite = np.zeros(count, dtype=np.int64)
        self.best = np.full(count, -np.inf)
        self._refresh(np.arange(count))

    def _allowed(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a cluster may be merged with each other one, (rows, clusters)."""
        spent = self.inside & (self.budget <= 0)
        shared = self.inside[rows].astype(np.float32) @ spent.T.astype(np.float32) > 0
        allowed: NDArray[np.bool_] = ~shared & self.alive[None, :]
        return allowed

    def _refresh(self, rows: NDArray[np.int64], *, whatever: bool = False) -> None:
        """Find the favourites of some clusters; ``whatever`` the budget."""
        for part in np.array_split(rows, max(1, len(rows) // 256)):
            if not len(part):
                continue
            allowed = self.alive[None, :] if whatever else self._allowed(part)
            values = np.where(allowed, self.similar[part], -np.inf)
            self.favourite[part] = values.argmax(1)
            self.best[part] = values.max(1)

    def merge_best(self) -> None:
        """Merge the two clusters that correlate best among those that may be merged."""
        one = int(self.best.argmax())
        exceeded = self.best[one] == -np.inf  # no merge is within the budget
        if exceeded:
            self._refresh(np.flatnonzero(self.alive), whatever=True)
            one = int(self.best.argmax())
        other = int(self.favourite[one])
        one, other = min(one, other), max(one, other)
        both = self.inside[one] & self.inside[other]
        before = self.budget > 0
        self.budget[both] -= 1
        merged = np.minimum(self.similar[one], self.similar[other])
        merged[merged > 0] *= self.factor
        merged[[one, other]] = -np.inf
        self.similar[one], self.similar[:, one] = merged, merged
        self.inside[one] |= self.inside[other]
        self.label[self.label == other] = one
        self.alive[other] = False
        self.best[other] = -np.inf
        self.clusters -= 1
        if exceeded or ((self.budget > 0) != before).any():
            stale = np.flatnonzero(self.alive)
        else:
            moved = np.isin(self.favourite, (one, other)) & self.alive
            moved[one] = True
            stale = np.flatnonzero(moved)
        self._refresh(stale)

    def numbers(self) -> Tensor:
        """Return the cluster of each unit, (networks, size)."""
        place = np.arange(len(self.label)) % self.size
        kept = np.flatnonzero(self.alive)
        first = [(int(place[self.label == c].min()), int(c)) for c in kept]
        number = {cluster: i for i, (_, cluster) in enumerate(sorted(first))}
        found = [number[int(c)] for c in self.label]
        return torch.tensor(found).view(len(self.inside[0]), self.size)
