"""Blocks of units that may change places as a whole, such as the groups of a convolution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fusion.alignment.ledger import Ledger
from fusion.alignment.units import Ints, Units

Home = tuple[int, int]  # number of a partition, block of it


def find_blocks(ledger: Ledger, units: Units) -> list[Ints]:
    """Return families of exchangeable blocks, each (blocks, units per block).

    Blocks of all partitions that share units form one block; two of them are alike if their units
    play the same roles. Units of one column of the result change places with one another.
    """
    roles = _roles(ledger, units)
    joined = _Disjoint()
    for unit, played in roles.items():
        first, *rest = sorted({role.home for role in played})
        for other in rest:
            if not units.is_fixed[unit]:
                joined.union(first, other)
    immovable: set[Home] = set()
    contents: dict[Home, list[int]] = defaultdict(list)
    for unit, played in roles.items():
        if units.is_fixed[unit]:
            immovable |= {joined.find(role.home) for role in played}
        else:
            contents[joined.find(played[0].home)].append(unit)
    blocks = [inside for home, inside in contents.items() if home not in immovable]
    colour = _first_colours(roles, units)
    if any(len({colour[unit] for unit in inside}) < len(inside) for inside in blocks):
        colour = _refined(roles, colour)
    alike: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for inside in blocks:
        ordered = sorted(inside, key=colour.__getitem__)
        signature = tuple(colour[unit] for unit in ordered)
        if len(set(signature)) == len(signature):
            alike[signature].append(ordered)
    families = [np.array(sorted(rows)) for rows in alike.values() if len(rows) > 1]
    return sorted(families, key=lambda family: int(family.min()))


class _Role(NamedTuple):
    """Position of a unit: partition, side, block and place in it."""

    partition: int
    side: int
    place: int
    block: int

    @property
    def home(self) -> Home:
        return self.partition, self.block


def _roles(ledger: Ledger, units: Units) -> dict[int, list[_Role]]:
    roles: dict[int, list[_Role]] = defaultdict(list)
    for k, blocks in enumerate(ledger.blocks):
        for s, side in enumerate(blocks.sides):
            for b, row in enumerate(units.of(side).tolist()):
                for place, unit in enumerate(row):
                    roles[unit].append(_Role(k, s, place, b))
    return roles


def _first_colours(roles: Mapping[int, list[_Role]], units: Units) -> dict[int, int]:
    """Number the units by their demands and roles, regardless of the block."""
    return _numbered({
        unit: (int(units.outer[unit]), *sorted(role[:3] for role in played))
        for unit, played in roles.items()
    })  # fmt: skip


def _refined(roles: Mapping[int, list[_Role]], colour: dict[int, int]) -> dict[int, int]:
    """Distinguish units by their blocks, and blocks by their units.

    Needed where blocks are nested: where each unit of a block makes a block of new units.
    """
    before = 0
    while (count := len(set(colour.values()))) > before:
        before = count
        inside: dict[Home, list[tuple[int, int, int]]] = defaultdict(list)
        for unit, played in roles.items():
            for role in played:
                inside[role.home].append((role.side, role.place, colour[unit]))
        kind = _numbered({home: (home[0], *sorted(found)) for home, found in inside.items()})
        colour = _numbered({
            unit: (colour[unit], *sorted((*role[:3], kind[role.home]) for role in played))
            for unit, played in roles.items()
        })  # fmt: skip
    return colour


def _numbered(described: Mapping[Any, tuple[Any, ...]]) -> dict[Any, int]:
    numbers: dict[tuple[Any, ...], int] = {}
    for description in sorted(set(described.values())):
        numbers[description] = len(numbers)
    return {key: numbers[description] for key, description in described.items()}


class _Disjoint:
    """Disjoint sets of blocks."""

    def __init__(self) -> None:
        self.parent: dict[Home, Home] = {}

    def find(self, item: Home) -> Home:
        root = item
        while (above := self.parent.get(root, root)) != root:
            root = above
        while item != root:
            item, self.parent[item] = self.parent.get(item, root), root
        return root

    def union(self, a: Home, b: Home) -> None:
        self.parent[self.find(b)] = self.find(a)
