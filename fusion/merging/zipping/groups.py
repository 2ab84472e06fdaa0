"""A basis for every group of units of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.alignment import Group, PermutationSpec
from fusion.merging.zipping.applying import Roles, mixable
from fusion.merging.zipping.basis import (
    Basis,
    assigned,
    canonical,
    of_clusters,
    of_permutations,
    of_reference,
)
from fusion.merging.zipping.clusters import SAME_PLACE, greedy_clusters

BasisKind = Literal["zip", "cca", "permutation"]


@dataclass(frozen=True)
class Clustering:
    """Options of the bases.

    Attributes:
        basis, within_budget, repeat_factor, ridge: see :class:`fusion.method.ZipIt`.
    """

    basis: BasisKind
    within_budget: float
    repeat_factor: float
    ridge: float


@dataclass(frozen=True)
class GroupRecord:
    """Record of one group of units.

    Attributes:
        group: its name.
        size: units of one network.
        how: ``zip``, ``cca``, ``permutation``, or ``in place`` where no features were recorded.
        within: merged features that some network has two units or more in.
        explained: mean correlation of a unit with its readout from the merged features.
    """

    group: str
    size: int
    how: str
    within: int
    explained: float


@dataclass(frozen=True, eq=False)
class GroupBases:
    """The bases of all groups of units.

    Attributes:
        experts: group → basis of the experts' units.
        base: group → unmerge matrix of the base; empty without a base.
        records: one for each group.
    """

    experts: Mapping[str, Basis]
    base: Mapping[str, Tensor]
    records: tuple[GroupRecord, ...]

    def readers(self, network: int) -> dict[str, Tensor]:
        """Return group → unmerge matrix of the expert of this number."""
        return {group: basis.unmerge[network] for group, basis in self.experts.items()}


def find_bases(
    spec: PermutationSpec,
    roles: Roles,
    correlations: Mapping[str, Tensor],
    clustering: Clustering,
    *,
    networks: int,
    has_base: bool,
) -> GroupBases:
    """Return a basis for each group of units.

    Units of which no features were recorded are averaged in place.

    Args:
        spec: the groups; of ``basis=permutation`` the networks are aligned already.
        roles: of the tensors' axes.
        correlations: group → correlation of the units of all experts, then of the base.
        clustering: how a basis is found.
        networks: number of experts.
        has_base: whether the base's units follow the experts'. It is the reference then, else the
            first expert is.
    """
    experts, base, records = {}, {}, []
    for group in spec.groups:
        if group.members:
            continue  # blocks were put in order as a whole
        whole = correlations.get(group.name)
        if whole is None:
            how, basis = "in place", of_reference(networks, group.size)
        else:
            how, basis = _basis(
                whole,
                networks,
                networks if has_base else 0,
                clustering,
                mix=mixable(spec, roles, group),
            )
        experts[group.name] = basis
        if has_base:
            zipped = whole is not None and how == "zip"
            # In the other bases the merged features are in the base's coordinates.
            eye = torch.eye(group.size, dtype=torch.float64)
            base[group.name] = _nearest(whole, basis) if zipped and whole is not None else eye
        records.append(_record(group, how, basis))
    return GroupBases(experts, base, tuple(records))


def _basis(
    correlation: Tensor, networks: int, reference: int, clustering: Clustering, *, mix: bool
) -> tuple[str, Basis]:
    """Return the kind of merge of one group, and its basis."""
    size = len(correlation) // max(networks, reference + 1)
    merged = correlation[: networks * size, : networks * size]
    if clustering.basis == "permutation":
        return "permutation", of_reference(networks, size, merged)
    if clustering.basis == "cca" and mix:
        return "cca", canonical(correlation, networks, reference, ridge=clustering.ridge)
    if clustering.basis == "cca":
        order = assigned(correlation, networks, reference)
        return "permutation", of_permutations(order, merged)
    clusters = greedy_clusters(
        merged,
        networks,
        within_budget=clustering.within_budget,
        repeat_factor=clustering.repeat_factor,
    )
    return "zip", of_clusters(clusters, merged)


def _nearest(correlation: Tensor, basis: Basis) -> Tensor:
    """Return the feature most similar to each unit of the base: its unmerge matrix, of 0 and 1."""
    networks, size = basis.networks, basis.merge.shape[1]
    theirs = correlation[networks * size :, : networks * size].view(size, networks, size)
    theirs = theirs + SAME_PLACE * torch.eye(size).unsqueeze(1)
    like = torch.einsum("jnl,ncl->jc", theirs.double(), basis.merge)
    return F.one_hot(like.argmax(1), size).double()


def _record(group: Group, how: str, basis: Basis) -> GroupRecord:
    within = 0 if how == "cca" else int((basis.unmerge.sum(1) > 1).any(0).sum())
    return GroupRecord(group.name, group.size, how, within, basis.explained())
