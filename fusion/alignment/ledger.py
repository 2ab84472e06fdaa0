"""Ledger of all demands of a network's operations on its atoms."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.alignment.labels import NONE


@dataclass(frozen=True, eq=False)
class Column:
    """One axis of one parameter or buffer and the atoms of its positions.

    ``rows`` bounds the rows of axis 0 to which a column on axis 1 applies (a grouped convolution
    keeps the inputs of each group in separate rows); ``None`` means all of them. ``view`` is
    the shape in which the tensor is read, ``None`` its own.
    """

    tensor: str
    axis: int
    rows: tuple[int, int] | None
    view: tuple[int, ...] | None
    atoms: Tensor


@dataclass(frozen=True, eq=False)
class Tie:
    """Pairs of atoms that move together: a symmetry takes pair i to a pair of equal ``marks``.

    All four are of shape (n,), but for ``marks`` that may be ``None``: all equal.
    """

    a: Tensor
    b: Tensor
    marks: Tensor | None


@dataclass(frozen=True, eq=False)
class Colouring:
    """A symmetry takes the atoms that carry a mark to atoms that carry the same: (n,) both."""

    atoms: Tensor
    marks: Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of channels into blocks of equal structure, each row of ``sides`` one block.

    ``sides`` holds atoms of shape (blocks, atoms per block): the inputs and the outputs of a
    grouped convolution, or the channels of a group norm. A symmetry permutes within blocks, or
    blocks as a whole.
    """

    sides: tuple[Tensor, ...]


@dataclass
class Ledger:
    """The demands, call by call."""

    count: int = 1  # atoms handed out; 0 is `NONE`
    columns: list[Column] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    colourings: list[Colouring] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)

    def column(
        self,
        tensor: str,
        axis: int,
        n: int,
        *,
        rows: tuple[int, int] | None = None,
        view: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return ``n`` new atoms, the positions along ``axis`` of ``tensor``: (n,) int64."""
        atoms = torch.arange(self.count, self.count + n)
        self.count += n
        self.columns.append(Column(tensor, axis, rows, view, atoms))
        return atoms

    def tie(self, a: Tensor, b: Tensor, marks: Tensor) -> None:
        """Demand that a symmetry take each pair (a[i], b[i]) to one of the same ``marks[i]``.

        The three are broadcast. Where only one of a pair is an atom, it is coloured by the mark.
        """
        a, b, marks = torch.broadcast_tensors(a, b, marks)  # type: ignore[no-untyped-call]
        a, b, marks = a.flatten(), b.flatten(), marks.flatten()
        both = (a != NONE) & (b != NONE)
        if not both.all():
            for one, other in ((a, b), (b, a)):
                lone = (one != NONE) & (other == NONE)
                self.colour(one[lone], marks[lone])
            a, b, marks = a[both], b[both], marks[both]
        if a.numel() and not (torch.equal(a, b) and not marks.any()):
            self.ties.append(Tie(a, b, marks if marks.any() else None))

    def colour(self, atoms: Tensor, marks: Tensor) -> None:
        """Demand that a symmetry take each atom to one that carries the same marks."""
        if marks.numel() == 1:  # number of its occurrences there
            first = int(atoms.min())
            marks = torch.bincount(atoms.flatten() - first)
            atoms = marks.nonzero().flatten() + first
            marks = marks[atoms - first]
        atoms, marks = torch.broadcast_tensors(atoms, marks)  # type: ignore[no-untyped-call]
        carried = atoms != NONE
        if carried.any():
            self.colourings.append(Colouring(atoms[carried], marks[carried]))

    def fix(self, atoms: Tensor, why: str) -> None:
        """Demand that ``atoms`` stay in place, because of ``why``."""
        atoms = atoms[atoms != NONE]
        if atoms.numel():
            self.fixed.append((atoms.flatten(), why))

    def partition(self, *sides: Tensor) -> None:
        """Demand that a symmetry keep the blocks of ``sides``; see `Blocks`."""
        sides = tuple(sorted(sides, key=lambda side: int(side.flatten()[0])))
        for blocks in self.blocks:
            if len(blocks.sides) == len(sides) and all(map(torch.equal, blocks.sides, sides)):
                return
        self.blocks.append(Blocks(sides))
