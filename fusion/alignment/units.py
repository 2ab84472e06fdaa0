"""Derive units from demands on atoms: atoms that move together, and exchangeable units.

Atoms that are tied are one *unit*. Within it every atom has a *mark*, such that a symmetry takes an
atom of one unit to the atom of another that has the same mark. Units of one *colour* may be
permuted: every demand is made of all of them, of atoms with the same marks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fusion.alignment.ledger import Ledger

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]  # (n, 2): two independent 64-bit hashes are taken as identity
FIXED_UNIT = 0


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a network.

    Attributes:
        of_atom: (atoms,) the unit of each atom; units are numbered in the order of the forward
            pass, `FIXED_UNIT` is that of `NONE`.
        mark: (atoms,) the place of each atom in its unit.
        is_fixed: (units,) whether a unit may not move.
        reasons: The operation that fixed a unit, if any.
        colour: (units,) units of one colour may be permuted among themselves.
        outer: (units,) the same, not counting which block of a grouped operation they are in.
    """

    of_atom: Ints
    mark: Ints
    is_fixed: NDArray[np.bool_]
    reasons: dict[int, str]
    colour: Ints
    outer: Ints

    def of(self, atoms: Tensor) -> Ints:
        """Return the unit of each of ``atoms``."""
        units: Ints = self.of_atom[atoms.numpy()]
        return units


def find_units(ledger: Ledger) -> Units:
    """Return the units that ``ledger`` allows to move, and their colours."""
    of_atom = _components(ledger)
    is_fixed = np.zeros(int(of_atom.max()) + 1, dtype=bool)
    is_fixed[FIXED_UNIT] = True
    reasons: dict[int, str] = {}

    def fix(units: Ints, why: str) -> None:
        for unit in units[~is_fixed[units]].tolist():
            reasons[unit] = why
        is_fixed[units] = True

    for fixed, why in ledger.fixed:
        fix(np.unique(of_atom[fixed.numpy()]), why)
    column = _columns(ledger)
    mark = column.copy()
    ambiguous = np.unique(_repeated(of_atom, mark, is_fixed))
    if len(ambiguous):
        inside = np.isin(of_atom, ambiguous)
        mark[inside] = int(column.max()) + 1 + _places(ledger, column, inside)
        twice = np.unique(_repeated(of_atom, mark, is_fixed))
        fix(twice, "occurring twice at places that cannot be distinguished")
    demands = _Hashed(of_atom, is_fixed)
    demands.add(of_atom, [mark])
    for k, colouring in enumerate(ledger.colourings):
        atoms = colouring.atoms.numpy()
        demands.add(of_atom[atoms], [1, k, mark[atoms], colouring.marks.numpy()])
    for k, tie in enumerate(ledger.ties):
        a, b = tie.a.numpy(), tie.b.numpy()
        marks = 0 if tie.marks is None else tie.marks.numpy()
        demands.add(of_atom[a], [2, k, mark[a], mark[b], marks])
    outer = demands.colours()
    for k, blocks in enumerate(ledger.blocks):
        for side in blocks.sides:
            atoms = side.flatten().numpy()
            block = np.repeat(np.arange(side.shape[0]), side.shape[1])
            demands.add(of_atom[atoms], [3, k, mark[atoms], block])
    return Units(of_atom, mark, is_fixed, reasons, demands.colours(), outer)


def _components(ledger: Ledger) -> Ints:
    """Join tied atoms; number the units by their first atom, so in the order of the pass."""
    n = ledger.count
    a = torch.cat([tie.a for tie in ledger.ties]).numpy() if ledger.ties else np.zeros(0, int)
    b = torch.cat([tie.b for tie in ledger.ties]).numpy() if ledger.ties else np.zeros(0, int)
    graph = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(n, n))
    component = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    unit_of: Ints = order[inverse]  # `NONE` is never tied, so alone and the first
    return unit_of


def _columns(ledger: Ledger) -> Ints:
    """Number the axes of tensors; (atoms,) the axis on which each stands."""
    column = np.zeros(ledger.count, dtype=np.int64)
    numbers: dict[tuple[str, int], int] = {}
    for one in ledger.columns:
        number = numbers.setdefault((one.tensor, one.axis), len(numbers) + 1)
        column[one.atoms.numpy()] = number
    return column


def _repeated(of_atom: Ints, mark: Ints, is_fixed: NDArray[np.bool_]) -> Ints:
    """Return the units of which two atoms have the same mark."""
    atoms = np.flatnonzero(~is_fixed[of_atom])
    order = atoms[np.lexsort((mark[atoms], of_atom[atoms]))]
    unit, place = of_atom[order], mark[order]
    found: Ints = unit[1:][(unit[1:] == unit[:-1]) & (place[1:] == place[:-1])]
    return found


def _places(ledger: Ledger, column: Ints, inside: NDArray[np.bool_]) -> Ints:
    """Number the atoms ``inside`` by their place in the ties between them.

    Colour refinement (Weisfeiler and Leman, 1968): atoms get different numbers if their axes or
    marks differ, or what they are tied to.
    """
    index = np.full(len(column), -1)
    index[inside] = np.arange(int(inside.sum()))
    colour = _mixed([column[inside]])
    sources, targets, labels = [], [], []
    for k, colouring in enumerate(ledger.colourings):
        atoms = index[colouring.atoms.numpy()]
        held = atoms >= 0
        np.add.at(colour, atoms[held], _mixed([1, k, colouring.marks.numpy()[held]]))
    for k, tie in enumerate(ledger.ties):
        a, b = index[tie.a.numpy()], index[tie.b.numpy()]
        held = a >= 0  # then so is b
        marks = np.zeros(len(a), dtype=np.int64) if tie.marks is None else tie.marks.numpy()
        for direction, (source, target) in enumerate(((a, b), (b, a))):
            sources.append(source[held])
            targets.append(target[held])
            labels.append(_mixed([2, k, direction, marks[held]]))
    source, target = np.concatenate(sources), np.concatenate(targets)
    label = np.concatenate(labels)
    count, before = 0, -1
    while count > before:
        before = count
        number: Ints = np.unique(colour, axis=0, return_inverse=True)[1].ravel()
        count = int(number.max()) + 1
        colour = _mixed([colour])
        np.add.at(colour, target, _mixed([colour[source], label]))
    return number


class _Hashed:
    """Sums of hashes of all demands on each unit."""

    def __init__(self, of_atom: Ints, is_fixed: NDArray[np.bool_]) -> None:
        self.sums = np.zeros((len(is_fixed), 2), dtype=np.uint64)

    def add(self, units: Ints, what: Iterable[int | Ints]) -> None:
        """Add demands, each made of the parts ``what``, to ``units``, one for each."""
        hashes = _mixed(what)
        np.add.at(self.sums, units, np.broadcast_to(hashes, (len(units), 2)))

    def colours(self) -> Ints:
        """Number the units by the demands on them."""
        number: Ints = np.unique(self.sums, axis=0, return_inverse=True)[1].ravel()
        return number


_STEP = np.array([0x9E3779B97F4A7C15, 0xD1342543DE82EF95], dtype=np.uint64)


def _mixed(parts: Iterable[int | Ints | Hashes]) -> Hashes:
    """Hash tuples of integers: two streams of splitmix64 (Steele et al., 2014); (n, 2)."""
    state = np.zeros((1, 2), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            values = np.asarray(part)
            if values.ndim < 2:
                values = values.reshape(-1, 1)
            z = (state + values.astype(np.uint64)) * _STEP + _STEP
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state
