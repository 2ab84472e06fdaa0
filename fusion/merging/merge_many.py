"""Bring any number of networks into one order without a reference (Git Re-Basin, Algorithm 3)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.alignment import (
    GroupAlignment,
    PermutationSpec,
    align,
    compose,
    identity_permutation,
)
from fusion.data import seed_from
from fusion.merging.averaging import mean_network
from fusion.weights import tensors_of

log = logging.getLogger(__name__)

MAX_ROUNDS = 50  # three digit networks of 350,000 weights converge in about 5


@dataclass(frozen=True, eq=False)
class Joined:
    """One network in the common order.

    Attributes:
        model: the network, with the same function as the given one.
        permutations: group → permutation, from the order in which it was given.
        objective_before: agreement with the mean of the others at its first turn.
        objective_after: the same at its last turn.
        groups: permuted units, and the total gain of all turns.
    """

    model: nn.Module
    permutations: Mapping[str, Tensor]
    objective_before: float
    objective_after: float
    groups: tuple[GroupAlignment, ...]


def merge_many(
    models: Mapping[str, nn.Module],
    spec: PermutationSpec,
    *,
    seed: int = 0,
    max_rounds: int = MAX_ROUNDS,
    device: torch.device | str | None = None,
) -> dict[str, Joined]:
    """Align each network to the mean of the others, in random order, until none moves.

    Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin" (arXiv 2209.04836), Algorithm 3.

    Args:
        models: two or more networks of one architecture in eval mode; they are not changed.
        spec: the symmetries of the architecture.
        seed: of the orders.
        max_rounds: bound on the rounds through all networks.
        device: where to compute.
    """
    names = list(models)
    current = dict(models)
    permutations = {name: identity_permutation(spec) for name in names}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    gains = {name: {group.name: 0.0 for group in spec.groups} for name in names}
    kinds = {group.name: "blocks" if group.members else "units" for group in spec.groups}
    for number in range(max_rounds):
        moved = False
        generator = torch.Generator().manual_seed(seed_from(seed, f"round {number}"))
        for index in torch.randperm(len(names), generator=generator).tolist():
            name = names[index]
            others = [current[other] for other in names if other != name]
            mean = mean_network(others[0], [tensors_of(other) for other in others])
            step = align(current[name], mean, spec=spec, seed=seed, device=device)
            first.setdefault(name, step.objective_before)
            last[name] = step.objective_after
            if step.changed:
                moved = True
                current[name] = step.model
                permutations[name] = compose(spec, permutations[name], step.permutations)
                for row in step.groups:
                    gains[name][row.group] += row.gain
        if not moved:
            log.debug("MergeMany: settled after %d rounds", number + 1)
            break
    else:
        log.warning("MergeMany: still moving after %d rounds", max_rounds)
    joined = {}
    for name in names:
        rows = []
        for group in spec.groups:
            places = permutations[name][group.name]
            count = int((places != torch.arange(group.size)).sum())
            rows.append(
                GroupAlignment(
                    group.name, kinds[group.name], group.size, count, gains[name][group.name]
                )
            )
        joined[name] = Joined(
            current[name], permutations[name], first[name], last[name], tuple(rows)
        )
    return joined
