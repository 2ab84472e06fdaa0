"""Concatenation of tensors, and insertion of one into another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.alignment.labels import Axes, Labels, along, made, numbered, pattern, support
from fusion.alignment.ledger import Ledger
from fusion.alignment.primitives import distinct_atoms
from fusion.alignment.rules.moves import complete
from fusion.alignment.rules.operation import Operation, Rule


def concatenation(op: Operation) -> Labels | None:
    """Put tensors side by side along an axis that they have (cat) or that is new (stack)."""
    parts = [part for part in op["tensors"] if not (part.rank == 1 and part.shape[0] == 0)]
    axis = op["dim"] or 0
    if op.name == "stack":
        axis %= parts[0].rank + 1
        parts = [part.viewed([*part.shape[:axis], 1, *part.shape[axis:]]) for part in parts]
    return joined(op.ledger, parts, axis % parts[0].rank, op.why)


def overwritten(op: Operation) -> Labels:
    """Put one tensor into another, at some positions of an axis."""
    x, source = op["self"], op["src"]
    axis = x.axis(op["dim"])
    if op.name == "select_scatter":
        source = source.viewed([*source.shape[:axis], 1, *source.shape[axis:]])
    source = source.lifted(x.rank)
    order = torch.arange(x.shape[axis])
    taken = torch.arange(source.shape[axis]) + x.shape[axis]
    if op.name == "select_scatter":
        order[op["index"]] = taken[0]
    else:
        order[slice(op["start"], op["end"], op["step"])] = taken
    both = joined(op.ledger, [x, source], axis, op.why)
    one = both.changed(lambda part: part.index_select(axis, order), x.shape)
    return complete(op.ledger, one, op.why)


def joined(ledger: Ledger, parts: Sequence[Labels], axis: int, why: str) -> Labels:
    """Return the labels of the concatenation of ``parts`` along ``axis``.

    Units of the other axes become one unit with those of the first part.
    """
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    slots = _slots(parts, axis)
    told_apart = False
    factors = []
    for (axes, _), slot in slots.items():
        if axes and all(support(factor) == axes and distinct_atoms(factor) for factor in slot):
            for part, factor in zip(parts[1:], slot[1:], strict=True):
                places = [pattern(one.sites, axes, one.rank) for one in (parts[0], part)]
                ledger.tie(slot[0], factor, numbered(places))
            slot = [slot[0]] * len(parts)
        atoms = [set(factor.flatten().tolist()) for factor in slot]
        told_apart |= sum(map(len, atoms)) == len(set().union(*atoms))
        factors.append(_side_by_side(slot, parts, axis))
    sites = [_side_by_side(row, parts, axis) for row in _rows(parts, axis)]
    if not told_apart:
        lengths = torch.tensor([part.shape[axis] for part in parts])
        owner = torch.repeat_interleave(torch.arange(len(parts)), lengths)
        sites.append(along(owner, axis, len(shape)))
    cause = next((part.cause for part in parts if not part.factors), parts[0].cause)
    return complete(ledger, made(shape, factors, sites, cause), why)


def _slots(parts: Sequence[Labels], axis: int) -> dict[tuple[Axes, int], list[Tensor]]:
    """Sort the factors of all parts by the axes, besides ``axis``, along which they change."""
    nothing = torch.zeros([1] * parts[0].rank, dtype=torch.int64)
    slots: dict[tuple[Axes, int], list[Tensor]] = {}
    for i, part in enumerate(parts):
        met: dict[Axes, int] = defaultdict(int)
        for factor in part.factors:
            axes = support(factor) - {axis}
            slots.setdefault((axes, met[axes]), [nothing] * len(parts))[i] = factor
            met[axes] += 1
    return slots


def _rows(parts: Sequence[Labels], axis: int) -> list[list[Tensor]]:
    """Sort the sites of all parts in the same way, one of each kind for each part."""
    nothing = torch.zeros([1] * parts[0].rank, dtype=torch.int64)
    rows: dict[Axes, list[Tensor]] = {}
    for i, part in enumerate(parts):
        for site in part.sites:
            row = rows.setdefault(support(site) - {axis}, [nothing] * len(parts))
            row[i] = numbered([row[i], site])
    return list(rows.values())


def _side_by_side(pieces: Sequence[Tensor], parts: Sequence[Labels], axis: int) -> Tensor:
    """Concatenate labels along ``axis``; labels equal in all parts are not changed."""
    first = pieces[0]
    if axis not in support(first) and all(torch.equal(first, piece) for piece in pieces[1:]):
        return first
    shape = [max(sizes) for sizes in zip(*(piece.shape for piece in pieces), strict=True)]
    full = []
    for piece, part in zip(pieces, parts, strict=True):
        shape[axis] = part.shape[axis]
        full.append(piece.expand(shape))
    return torch.cat(full, dim=axis)


RULES: dict[str, Rule] = {
    "cat": concatenation,
    "stack": concatenation,
    "slice_scatter": overwritten,
    "select_scatter": overwritten,
}
