"""Blocks of units that may change places as a whole: the groups of grouped convolutions."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from fusion.alignment.ledger import Ledger
from fusion.alignment.units import Ints, Units

Home = tuple[int, int]  # number of a partition, block of it


def find_blocks(ledger: Ledger, units: Units) -> list[Ints]:
    """Return families of exchangeable blocks, each (blocks, units per block).

    Blocks of several grouped operations that share units form one block; two blocks are alike if
    their units play the same roles. Units of one column of the result change places with one
    another.
    """
    roles: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # partition, side, place
    homes: dict[int, set[Home]] = defaultdict(set)
    for k, blocks in enumerate(ledger.blocks):
        for s, side in enumerate(blocks.sides):
            for b, row in enumerate(units.of(side).tolist()):
                for place, unit in enumerate(row):
                    roles[unit].append((k, s, place))
                    homes[unit].add((k, b))
    joined = _Disjoint()
    for unit, places in homes.items():
        first, *rest = sorted(places)
        for other in rest:
            if not units.is_fixed[unit]:
                joined.union(first, other)
    immovable = {
        joined.find(home) for unit in homes if units.is_fixed[unit] for home in homes[unit]
    }
    contents: dict[Home, list[int]] = defaultdict(list)
    for unit, places in homes.items():
        contents[joined.find(next(iter(places)))].append(unit)
    partitions: dict[Home, list[int]] = defaultdict(list)
    for home in {home for places in homes.values() for home in places}:
        partitions[joined.find(home)].append(home[0])
    alike: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
    for block, inside in contents.items():
        if block in immovable or len(set(partitions[block])) < len(partitions[block]):
            continue
        keyed = sorted((sorted(roles[unit]), int(units.outer[unit]), unit) for unit in inside)
        signature = tuple((tuple(role), colour) for role, colour, _ in keyed)
        if len(set(signature)) == len(signature):
            alike[signature].append([unit for _, _, unit in keyed])
    families = [np.array(sorted(blocks)) for blocks in alike.values() if len(blocks) > 1]
    return sorted(families, key=lambda family: int(family.min()))


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
