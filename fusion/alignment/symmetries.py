"""From labels to symmetries: the largest groups of units that all operations let change places."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from fusion.alignment.labeller import Labeller
from fusion.alignment.labels import FIXED, Ledger
from fusion.alignment.rules import Rules
from fusion.alignment.spec import Entry, Fixed, Group, PermutationSpec
from fusion.alignment.tracing import trace
from fusion.errors import UserError

Ints = NDArray[np.int64]
FIXED_UNIT = -1


def permutation_spec(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...]
) -> PermutationSpec:
    """Find the groups of units of ``model`` that may be permuted without changing its function.

    The network is traced with torch.fx in eval mode, without its weights; parameters that only
    training mode uses (auxiliary heads) are found in a second trace. What cannot be proven to be a
    symmetry is left fixed and named in ``spec.fixed``.

    Args:
        model: A network in eval mode; it is not changed.
        example_input: An input as the network takes it, batch axis included (N, C, H, W); a tuple
            for several arguments. Only its shape matters.

    Raises:
        UserError: the model is in training mode, cannot be traced, or does not take the input.
    """
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise UserError(
            f"example_input is {example_input!r}; give a tensor as the network takes it, such as "
            f"torch.zeros(1, 3, 32, 32), or a tuple of tensors"
        )
    require_eval_mode(model, "the model")
    with torch.device("cpu"):  # labels live there, whatever the default device
        labeller = Labeller(model)
        labeller.walk(trace(model, inputs))
        parameters = {name for name, _ in model.named_parameters()}
        if not parameters <= _reached(labeller.rules):
            try:
                graph = trace(model, inputs, training=True)
            except UserError:
                pass  # training mode may need a larger image: its parameters are named as not used
            else:
                labeller.walk(graph)
        return _Finder(labeller.rules, model).spec()


def require_eval_mode(model: nn.Module, which: str) -> None:
    """Check that no module of ``model`` is in training mode.

    Raises:
        UserError: one is.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f"its module '{training[0]}'" if training[0] else type(model).__name__
        raise UserError(
            f"{which} must be in eval mode (batch statistics and dropout hide what a permutation "
            f"changes), but {where} is in training mode; call .eval() first"
        )


def _reached(rules: Rules) -> set[str]:
    used = {use.tensor for use in rules.ledger.uses.values()}
    used |= rules.elementwise_parameters.keys() | rules.refused.keys()
    return {key for key, first in rules.first_name.items() if first in used}


@dataclass(frozen=True, eq=False)
class _Location:
    """One axis of one tensor with the unit at each position (`FIXED_UNIT` if it may not move)."""

    tensor: str
    axis: int
    rows: tuple[int, int] | None
    units: Ints
    marks: Ints


class _Finder:
    """Refines units into groups and blocks, and writes them down tensor by tensor."""

    def __init__(self, rules: Rules, model: nn.Module) -> None:
        self.rules = rules
        self.ledger: Ledger = rules.ledger
        self.shapes = {
            key: tuple(value.shape)
            for key, value in model.state_dict().items()
            if isinstance(value, Tensor)  # not a module's extra state
        }
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.names: dict[str, list[str]] = defaultdict(list)  # first key -> all keys of the tensor
        for key, first in rules.first_name.items():
            self.names[first].append(key)
        self.unit_of = self._merge()  # label -> unit
        self.reasons: dict[int, str] = {}
        self._fix_forced()
        self.locations = self._locations()
        colourings = [(self._units(a), _array(b)) for a, b in self.ledger.colourings]
        # The columns of a grouped convolution move with its rows: there blocks may be exchanged.
        colourings += [(p.units, p.marks) for p in self.locations if p.rows is None]
        splits = [
            (self._units(side).ravel(), np.repeat(np.arange(side.shape[0]), side.shape[1]))
            for blocks in self.ledger.blocks
            for side in blocks.sides
        ]
        self._fix_repeated(colourings)
        self.colour = np.zeros(len(self.is_fixed), dtype=np.int64)
        self.colours = 1
        self._refine(colourings)
        self.outer = self.colour.copy()  # what blocks as a whole must agree in
        self._refine(splits)
        self._refine([(p.units, p.marks) for p in self.locations if p.rows is not None])

    # -- units ------------------------------------------------------------------------------------

    def _merge(self) -> Ints:
        """Join tied labels; number the units by their first label, so in the order of the pass."""
        n = self.ledger.count
        ties = self.ledger.ties
        pairs = _array(torch.cat(ties, dim=1)) if ties else np.zeros((2, 0), dtype=np.int64)
        graph = coo_matrix((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(n, n))
        component = connected_components(graph, directed=False)[1]
        _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
        order = np.empty(len(first), dtype=np.int64)
        order[np.argsort(first)] = np.arange(len(first))
        unit_of: Ints = order[inverse]  # label 0 is alone, so `FIXED` is unit 0
        return unit_of

    def _fix_forced(self) -> None:
        self.is_fixed = np.zeros(int(self.unit_of.max()) + 1, dtype=bool)
        self.is_fixed[self.unit_of[FIXED]] = True
        for labels, why in self.ledger.fixed:
            self._fix(np.unique(self.unit_of[_array(labels)]), why)

    def _fix(self, units: Ints, why: str) -> None:
        for unit in units[~self.is_fixed[units]].tolist():
            self.reasons[unit] = why
        self.is_fixed[units] = True

    def _units(self, labels: Tensor) -> Ints:
        return self.unit_of[_array(labels)]

    def _locations(self) -> list[_Location]:
        locations = [
            _Location(use.tensor, use.axis, use.rows, self._units(use.labels), _array(use.marks))
            for use in self.ledger.uses.values()
        ]
        for tensor, labels in self.rules.elementwise_parameters.items():
            units = self._units(labels.units)
            varying = [a for a in range(units.ndim) if (units != units.take([0], axis=a)).any()]
            if len(varying) > 1:
                self._fix(np.unique(units), f"{tensor}, whose units change along several axes")
            axis = varying[0] if varying else _longest(units.shape)
            if units.ndim == 0:
                self._fix(np.unique(units), f"{tensor}, one number for all channels")
                continue
            if not varying and units.shape[axis] > 1:
                self._fix(np.unique(units), f"{tensor}, one unit all along")
            along = np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1)[:, 0]
            locations.append(_Location(tensor, axis, None, along, np.zeros_like(along)))
        return locations

    def _fix_repeated(self, colourings: Sequence[tuple[Ints, Ints]]) -> None:
        """Fix units that stand twice at one site: which copy follows which cannot be told."""
        for units, marks in colourings:
            order = np.lexsort((marks, units))
            u, m = units[order], marks[order]
            twice = (u[1:] == u[:-1]) & (m[1:] == m[:-1])
            if twice.any():
                self._fix(np.unique(u[1:][twice]), "standing twice in one activation")

    def _refine(self, colourings: Sequence[tuple[Ints, Ints]]) -> None:
        """Split the colours until equal colour means equal marks in every colouring."""
        for units, marks in colourings:
            free = ~self.is_fixed[units]
            if not free.any():
                continue
            units, marks = units[free], marks[free]
            order = np.lexsort((marks, units))
            units, marks = units[order], marks[order]
            found, start, count = np.unique(units, return_index=True, return_counts=True)
            signature = np.zeros(len(found), dtype=np.int64)
            offset = 0
            for k in np.unique(count):
                same = count == k
                rows = marks[start[same, None] + np.arange(k)]
                number = np.unique(rows, axis=0, return_inverse=True)[1].ravel()
                signature[same] = offset + number
                offset += int(number.max()) + 1
            pairs = np.stack([self.colour[found], signature], axis=1)
            number = np.unique(pairs, axis=0, return_inverse=True)[1].ravel()
            self.colour[found] = self.colours + number
            self.colours += int(number.max()) + 1

    # -- blocks -----------------------------------------------------------------------------------

    def _families(self) -> list[Ints]:
        """Return families of exchangeable blocks, each (blocks, units per block).

        Blocks of several grouped convolutions that share units form one block; two blocks are
        alike if their units play the same roles. Units of one column of the result change places
        with one another.
        """
        roles: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # structure, side, place
        homes: dict[int, set[tuple[int, int]]] = defaultdict(set)  # unit -> (structure, block)
        for k, blocks in enumerate(self.ledger.blocks):
            for s, side in enumerate(blocks.sides):
                for b, row in enumerate(self._units(side).tolist()):
                    for place, unit in enumerate(row):
                        roles[unit].append((k, s, place))
                        homes[unit].add((k, b))
        joined = _Disjoint()
        for unit, places in homes.items():
            first, *rest = sorted(places)
            for other in rest:
                if not self.is_fixed[unit]:
                    joined.union(first, other)
        immovable = {
            joined.find(home) for unit in homes if self.is_fixed[unit] for home in homes[unit]
        }
        contents: dict[tuple[int, int], list[int]] = defaultdict(list)
        for unit, places in homes.items():
            contents[joined.find(next(iter(places)))].append(unit)
        structures: dict[tuple[int, int], list[int]] = defaultdict(list)
        for home in {home for places in homes.values() for home in places}:
            structures[joined.find(home)].append(home[0])
        alike: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
        for block, units in contents.items():
            if block in immovable or len(set(structures[block])) < len(structures[block]):
                continue
            keyed = sorted((sorted(roles[unit]), int(self.outer[unit]), unit) for unit in units)
            signature = tuple((tuple(role), colour) for role, colour, _ in keyed)
            if len(set(signature)) == len(signature):
                alike[signature].append([unit for _, _, unit in keyed])
        families = [np.array(sorted(blocks)) for blocks in alike.values() if len(blocks) > 1]
        return sorted(families, key=lambda family: int(family.min()))

    # -- writing ----------------------------------------------------------------------------------

    def spec(self) -> PermutationSpec:
        """Write the groups, what is fixed, and how much is covered."""
        families = self._families()
        # Unit i of a group inside one block must be what unit i is in every other block: there
        # units are numbered by their place in the block, not in the pass.
        number = np.arange(len(self.is_fixed))
        for family in families:
            number[family] = np.arange(family.shape[1])
        colours, size = np.unique(self.colour[~self.is_fixed], return_counts=True)
        group_sizes = dict(zip(colours.tolist(), size.tolist(), strict=True))
        entries: dict[int, list[Entry]] = defaultdict(list)  # colour -> entries
        for place in self.locations:
            free = np.flatnonzero(~self.is_fixed[place.units])
            units = place.units[free]
            colour = self.colour[units]
            order = np.lexsort((place.marks[free], number[units], colour))
            cuts = np.flatnonzero(np.diff(colour[order])) + 1
            for part in np.split(order, cuts):
                if len(part) and group_sizes[int(colour[part[0]])] > 1:
                    positions = free[part].reshape(group_sizes[int(colour[part[0]])], -1)
                    entries[int(colour[part[0]])].extend(self._entries(place, positions))
        first_unit: dict[int, int] = {}
        for unit, colour_of in enumerate(self.colour.tolist()):
            first_unit.setdefault(colour_of, unit)
        names = _unique_names(
            {c: entries[c][0] for c in sorted(entries, key=first_unit.__getitem__)}
        )
        keyed = [
            ((first_unit[c], 1), Group(names[c], group_sizes[c], tuple(entries[c]))) for c in names
        ]
        taken = set(names.values())
        for family in families:
            found, members = self._block_entries(family), []
            for row in family:
                inside = dict.fromkeys(self.colour[row].tolist())
                members.append(tuple(names[c] for c in inside if c in names))
            name = f"{_owner(found[0].tensor)} blocks"
            while name in taken:
                name += "'"
            taken.add(name)
            group = Group(name, len(family), tuple(found), tuple(members))
            keyed.append(((int(family.min()), 0), group))
        keyed.sort(key=lambda pair: pair[0])
        groups = tuple(group for _, group in keyed)
        fixed = self._fixed(families)
        return PermutationSpec(groups, self.shapes, fixed, self._coverage(groups))

    def _entries(self, place: _Location, positions: Ints) -> list[Entry]:
        where = torch.from_numpy(np.ascontiguousarray(positions))
        return [Entry(key, place.axis, where, place.rows) for key in self.names[place.tensor]]

    def _block_entries(self, family: Ints) -> list[Entry]:
        block = np.full(len(self.is_fixed), -1)
        rank = np.zeros(len(self.is_fixed), dtype=np.int64)
        block[family] = np.arange(len(family))[:, None]
        rank[family] = np.arange(family.shape[1])
        found = []
        for place in self.locations:
            if place.rows is not None:
                continue  # the columns of a grouped convolution move with its rows
            inside = np.flatnonzero(block[place.units] >= 0)
            if len(inside):
                units = place.units[inside]
                order = np.lexsort((place.marks[inside], rank[units], block[units]))
                found.extend(self._entries(place, inside[order].reshape(len(family), -1)))
        return found

    def _fixed(self, families: Sequence[Ints]) -> tuple[Fixed, ...]:
        movable = np.zeros(len(self.is_fixed), dtype=bool)
        colours, size = np.unique(self.colour, return_counts=True)
        movable[np.isin(self.colour, colours[size > 1]) & ~self.is_fixed] = True
        for family in families:
            movable[family] = True
        counts: dict[tuple[str, int, str], int] = defaultdict(int)
        seen = set()
        for place in self.locations:
            seen.add((place.tensor, place.axis))
            for unit in place.units[~movable[place.units]].tolist():
                alone = "no other unit being like it"
                reason = self.reasons.get(unit, "input" if unit == 0 else alone)
                counts[place.tensor, place.axis, reason] += 1
        fixed = [Fixed(t, axis, n, why) for (t, axis, why), n in counts.items()]
        for key in self.parameters:
            first = self.rules.first_name[key]
            if not any((first, axis) in seen for axis in range(len(self.shapes[key]))):
                why = self.rules.refused.get(first, "the forward pass, which does not use it")
                fixed.append(Fixed(key, 0, self.shapes[key][0] if self.shapes[key] else 1, why))
        order = {key: i for i, key in enumerate(self.shapes)}
        return tuple(sorted(fixed, key=lambda f: (order[f.tensor], f.axis)))

    def _coverage(self, groups: Sequence[Group]) -> float:
        rows: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for entry in (entry for group in groups for entry in group.entries):
            shape = self.shapes[entry.tensor]
            if entry.axis == 0:
                mask = rows.setdefault(entry.tensor, torch.zeros(shape[0], dtype=torch.bool))
                mask[entry.positions.flatten()] = True
            else:
                count = columns.setdefault(entry.tensor, torch.zeros(shape[0], dtype=torch.int64))
                count[slice(*entry.rows) if entry.rows else slice(None)] += entry.positions.numel()
        total = left = 0
        for key in self.parameters:
            if self.rules.first_name[key] != key:
                continue
            shape = self.shapes[key]
            total += math.prod(shape)
            if not shape:
                left += 1
                continue
            width = shape[1] if len(shape) > 1 else 1
            open_rows = ~rows.get(key, torch.zeros(shape[0], dtype=torch.bool))
            count = columns.get(key, torch.zeros(shape[0], dtype=torch.int64))
            uncovered = (width - count[open_rows]).clamp(min=0).sum()
            left += int(uncovered) * (math.prod(shape[2:]))
        return 1 - left / max(total, 1)


class _Disjoint:
    """Disjoint sets of hashable things."""

    def __init__(self) -> None:
        self.parent: dict[tuple[int, int], tuple[int, int]] = {}

    def find(self, item: tuple[int, int]) -> tuple[int, int]:
        root = item
        while (above := self.parent.get(root, root)) != root:
            root = above
        while item != root:
            item, self.parent[item] = self.parent.get(item, root), root
        return root

    def union(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        self.parent[self.find(b)] = self.find(a)


def _unique_names(first: dict[int, Entry]) -> dict[int, str]:
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
    return tensor.rpartition(".")[0] or tensor


def _longest(shape: tuple[int, ...]) -> int:
    return max(range(len(shape)), key=shape.__getitem__, default=0)


def _array(tensor: Tensor) -> Ints:
    array: Ints = tensor.contiguous().numpy()
    return array
