"""Write units and blocks as groups, tensor by tensor, with fixed positions and reasons."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fusion.alignment.blocks import find_blocks
from fusion.alignment.labeller import Labeller
from fusion.alignment.ledger import Column
from fusion.alignment.primitives import SILENT
from fusion.alignment.spec import Entry, Fixed, Group, PermutationSpec
from fusion.alignment.units import Ints, find_units


def written(labeller: Labeller, model: nn.Module) -> PermutationSpec:
    """Return the groups of ``model``, the fixed positions, and the covered share."""
    return _Writer(labeller, model).spec()


class _Writer:
    def __init__(self, labeller: Labeller, model: nn.Module) -> None:
        self.labeller = labeller
        self.shapes = {
            key: tuple(value.shape)
            for key, value in model.state_dict().items()
            if isinstance(value, Tensor)  # not a module's extra state
        }
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.keys: dict[str, list[str]] = defaultdict(list)  # first key -> all keys of the tensor
        for key, first in labeller.first_name.items():
            self.keys[first].append(key)
        self.units = find_units(labeller.ledger)
        self.families = find_blocks(labeller.ledger, self.units)
        # Unit i of a group inside one block must be what unit i is in every other block: there
        # units are numbered by their place in the block, not in the pass.
        self.number = np.arange(len(self.units.is_fixed))
        for family in self.families:
            self.number[family] = np.arange(family.shape[1])
        movable = self.units.colour[~self.units.is_fixed]
        colours, sizes = np.unique(movable, return_counts=True)
        self.sizes = dict(zip(colours.tolist(), sizes.tolist(), strict=True))

    def spec(self) -> PermutationSpec:
        entries: dict[int, list[Entry]] = defaultdict(list)  # colour -> entries
        for column in self.labeller.ledger.columns:
            for colour, positions in self._in_column(column):
                entries[colour].extend(self._entries(column, positions))
        first_unit: dict[int, int] = {}
        for unit, colour in enumerate(self.units.colour.tolist()):
            if not self.units.is_fixed[unit]:
                first_unit.setdefault(colour, unit)
        order = sorted(entries, key=first_unit.__getitem__)
        names = _unique_names({colour: entries[colour][0] for colour in order})
        keyed = [
            ((first_unit[c], 1), Group(names[c], self.sizes[c], tuple(entries[c]))) for c in names
        ]
        taken = set(names.values())
        for family in self.families:
            found, members = self._block_entries(family), []
            for row in family:
                inside = dict.fromkeys(self.units.colour[row].tolist())
                members.append(tuple(names[c] for c in inside if c in names))
            name = f"{_owner(found[0].tensor)} blocks"
            while name in taken:
                name += "'"
            taken.add(name)
            group = Group(name, len(family), tuple(found), tuple(members))
            keyed.append(((int(family.min()), 0), group))
        keyed.sort(key=lambda pair: pair[0])
        groups = tuple(group for _, group in keyed)
        return PermutationSpec(groups, self.shapes, self._fixed(), self._coverage(groups))

    def _in_column(self, column: Column) -> list[tuple[int, Ints]]:
        """Return the positions of each group in ``column``, (size, k)."""
        of = self.units.of(column.atoms)
        free = np.flatnonzero(~self.units.is_fixed[of])
        unit, mark = of[free], self.units.mark[column.atoms.numpy()][free]
        colour = self.units.colour[unit]
        order = np.lexsort((mark, self.number[unit], colour))
        cuts = np.flatnonzero(np.diff(colour[order])) + 1
        parts = [part for part in np.split(order, cuts) if len(part)]
        groups = [int(colour[part[0]]) for part in parts]
        return [
            (group, free[part].reshape(self.sizes[group], -1))
            for group, part in zip(groups, parts, strict=True)
            if self.sizes[group] > 1
        ]

    def _entries(self, column: Column, positions: Ints) -> list[Entry]:
        where = torch.from_numpy(np.ascontiguousarray(positions))
        return [
            Entry(key, column.axis, where, column.rows, column.view)
            for key in self.keys[column.tensor]
        ]

    def _block_entries(self, family: Ints) -> list[Entry]:
        block = np.full(len(self.units.is_fixed), -1)
        rank = np.zeros(len(self.units.is_fixed), dtype=np.int64)
        block[family] = np.arange(len(family))[:, None]
        rank[family] = np.arange(family.shape[1])
        found = []
        for column in self.labeller.ledger.columns:
            if column.rows is not None:
                continue  # the columns of a grouped convolution move with its rows
            of, mark = self.units.of(column.atoms), self.units.mark[column.atoms.numpy()]
            inside = np.flatnonzero(block[of] >= 0)
            if len(inside):
                unit = of[inside]
                order = np.lexsort((mark[inside], rank[unit], block[unit]))
                found.extend(self._entries(column, inside[order].reshape(len(family), -1)))
        return found

    def _fixed(self) -> tuple[Fixed, ...]:
        units = self.units
        movable = np.zeros(len(units.is_fixed), dtype=bool)
        shared = [colour for colour, size in self.sizes.items() if size > 1]
        movable[np.isin(units.colour, shared) & ~units.is_fixed] = True
        for family in self.families:
            movable[family] = True
        counts: dict[tuple[str, int, str], int] = defaultdict(int)
        for column in self.labeller.ledger.columns:
            if (
                column.axis > 1
                and column.view is None
                and math.prod(self.shapes[column.tensor][:2]) > 1
            ):
                continue  # the positions of a kernel, which are not expected to move
            of = units.of(column.atoms)
            for unit in of[~movable[of]].tolist():
                reason = units.reasons.get(unit, "no other unit being like it")
                if reason != SILENT:
                    counts[column.tensor, column.axis, reason] += 1
        fixed = [Fixed(t, axis, n, why) for (t, axis, why), n in counts.items()]
        for key in self.parameters:
            if self.labeller.first_name[key] not in self.labeller.state:
                why = "the forward pass, which does not use it"
                fixed.append(Fixed(key, 0, self.shapes[key][0] if self.shapes[key] else 1, why))
            elif math.prod(self.shapes[key]) == 1:
                fixed.append(Fixed(key, 0, 1, "being one number"))
        order = {key: i for i, key in enumerate(self.shapes)}
        return tuple(sorted(fixed, key=lambda f: (order[f.tensor], f.axis)))

    def _coverage(self, groups: Sequence[Group]) -> float:
        held: dict[str, list[Entry]] = defaultdict(list)
        for group in groups:
            for entry in group.entries:
                held[entry.tensor].append(entry)
        keys = [key for key in self.parameters if key in self.labeller.state]
        total = sum(math.prod(self.shapes[key]) for key in keys)
        left = sum(_uncovered(self.shapes[key], held[key]) for key in keys)
        return 1 - left / max(total, 1)


def _uncovered(shape: tuple[int, ...], entries: Sequence[Entry]) -> int:
    """Return the number of elements at no axis position named by an entry."""
    shape = next((entry.view for entry in entries if entry.view is not None), shape)
    free = [torch.ones(n, dtype=torch.bool) for n in shape]
    for entry in entries:
        if entry.rows is None:
            free[entry.axis][entry.positions.flatten()] = False
    confined = [entry for entry in entries if entry.rows is not None]
    if not confined:
        return math.prod(int(axis.sum()) for axis in free)
    columns = int(free[1].sum())
    left = torch.where(free[0], columns, 0)  # of each row
    for entry in confined:
        assert entry.rows is not None
        covered = int(free[1][entry.positions.flatten()].sum())
        left[slice(*entry.rows)] -= covered * free[0][slice(*entry.rows)]
    return int(left.clamp(min=0).sum()) * math.prod(int(axis.sum()) for axis in free[2:])


def _unique_names(first: Mapping[int, Entry]) -> dict[int, str]:
    """Name each group after the module of its first tensor, numbered where one makes several."""
    owners = {colour: _owner(entry.tensor) for colour, entry in first.items()}
    many: dict[str, int] = defaultdict(int)
    for owner in owners.values():
        many[owner] += 1
    names: dict[int, str] = {}
    used: dict[str, int] = defaultdict(int)
    for colour, owner in owners.items():
        names[colour] = owner if many[owner] == 1 else f"{owner}/{used[owner]}"
        used[owner] += 1
    return names


def _owner(tensor: str) -> str:
    path = tensor.rpartition(".")[0] or tensor
    return path.replace(".parametrizations.weight", "")
