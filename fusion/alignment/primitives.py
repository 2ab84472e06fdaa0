"""Primitive ways in which operations combine elements, with the demands of each.

Every rule of an operation is put together from these: `meet` (element by element), `reduce` (over
axes), `normalise` (an element and a sum over its axes), `contract` (sums of products) and `spread`
(an element of the result depends on all elements along some axes, each in a distinct way).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusion.alignment.labels import (
    NONE,
    Axes,
    Labels,
    compact,
    fibres,
    grid,
    made,
    numbered,
    pattern,
    support,
    tidy,
)
from fusion.alignment.ledger import Ledger

SILENT = ""  # the reason of atoms that are not expected to move: the positions of a kernel


def demote(ledger: Ledger, x: Labels, factor: Tensor, why: str) -> Labels:
    """Fix the atoms of one factor: from now on they only distinguish elements."""
    ledger.fix(factor, why)
    factors = tuple(part for part in x.factors if part is not factor)
    return replace(x, factors=factors, sites=tidy((*x.sites, factor)), cause=why or x.cause)


def confine(ledger: Ledger, x: Labels, axes: Axes, why: str) -> Labels:
    """Let no factor change along ``axes``, where every position has a distinct meaning.

    All atoms at one place of the other axes move together (after a pixel shuffle, the channels that
    make one channel); where there are no other axes, they are fixed.
    """
    for factor in x.factors:
        if support(factor) & axes:
            x = _gathered(ledger, x, factor, axes) or demote(ledger, x, factor, why)
    return x


def _gathered(ledger: Ledger, x: Labels, factor: Tensor, axes: Axes) -> Labels | None:
    kept = support(factor) - axes
    others = [other for other in x.factors if other is not factor]
    if not kept or any(support(other) & support(factor) for other in others):
        return None
    rows = _rows_of(factor, kept)
    terms, which = torch.unique(rows, dim=1, return_inverse=True)
    if not all(distinct_atoms(term) for term in terms.T):
        return None
    for number, term in enumerate(terms.T):
        ledger.tie(terms[:, 0], term, torch.tensor(number))
    shape = [size if axis in kept else 1 for axis, size in enumerate(factor.shape)]
    place = which.view([1 if axis in kept else size for axis, size in enumerate(factor.shape)])
    factors = [terms[:, 0].reshape(shape) if f is factor else f for f in x.factors]
    return made(x.shape, factors, (*x.sites, place), x.cause)


# -- element by element ----------------------------------------------------------------------------


def meet(ledger: Ledger, a: Labels, b: Labels, why: str) -> Labels:
    """Combine two tensors element by element, with broadcasting.

    Atoms that meet at a position are tied. A factor that meets none is exchanged only among
    positions at which the other tensor holds the same.
    """
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    rank = len(shape)
    a, b, pairs = _paired(ledger, a.lifted(rank), b.lifted(rank), why)
    sites = tidy((*a.sites, *b.sites))
    factors, more = [], list(sites)
    for f, g in pairs:
        kept, rank_of = _tied(ledger, f, g, pattern(sites, support(f) | support(g), rank))
        factors.append(kept)
        more += rank_of
    met = {id(part) for pair in pairs for part in pair}
    for one, other in ((a, b), (b, a)):
        for factor in one.factors:
            if id(factor) in met:
                continue
            where = pattern(sites, support(factor), rank)
            if 1 < factor.numel() == int(where.max()) + 1:
                ledger.fix(factor, other.cause or why)  # its sites distinguish all its atoms
                continue
            ledger.colour(factor, where)
            if factor.numel() > 1:  # a single atom is now like no other: it stays
                factors.append(factor)
    cause = a.cause if not a.factors or not b.cause else b.cause
    return Labels(shape, tuple(factors), tidy(more), cause)


def _paired(
    ledger: Ledger, a: Labels, b: Labels, why: str
) -> tuple[Labels, Labels, list[tuple[Tensor, Tensor]]]:
    """Find the factors of ``a`` and ``b`` that change along common axes.

    Where several meet one, only the first can be tied: the others are fixed.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    of_a, of_b = list(a.factors), list(b.factors)
    for f in a.factors:
        # An atom for each position in both: what else changes along these axes follows.
        fits = (g for g in of_b if support(f) == support(g) and _all_distinct(f, g))
        if (g := next(fits, None)) is not None:
            pairs.append((f, g))
            of_a, of_b = _without(of_a, f), _without(of_b, g)
    sets: list[tuple[list[Tensor], list[Tensor]]] = [([f], []) for f in of_a]
    for g in of_b:
        touched = [one for one in sets if any(support(f) & support(g) for f in one[0])]
        others = [one for one in sets if not any(one is other for other in touched)]
        joined = [f for one in touched for f in one[0]], [h for one in touched for h in one[1]]
        sets = [*others, (joined[0], [*joined[1], g])]
    for some_a, some_b in sets:
        if not some_a or not some_b or _side_by_side(ledger, some_a, some_b):
            continue
        if len(some_a) == len(some_b) > 1 and all(map(_one_to_one, some_a, some_b)):
            pairs += zip(some_a, some_b, strict=True)
            continue
        for f in some_a[1:]:
            a = demote(ledger, a, f, why)
        for g in some_b[1:]:
            b = demote(ledger, b, g, why)
        pairs.append((some_a[0], some_b[0]))
    return a, b, pairs


def _side_by_side(ledger: Ledger, some_a: Sequence[Tensor], some_b: Sequence[Tensor]) -> bool:
    """Whether two factors meet along one axis, but each also varies along separate axes.

    So do the channels of queries and of keys in each head of an attention between channels.
    """
    if len(some_a) > 1 or len(some_b) > 1:
        return False
    (f,), (g,) = some_a, some_b
    both = support(f) & support(g)
    return both < support(f) and both < support(g) and combined(ledger, f, g)


def _without(parts: Sequence[Tensor], one: Tensor) -> list[Tensor]:
    return [part for part in parts if part is not one]


def _all_distinct(f: Tensor, g: Tensor) -> bool:
    return bool(support(f)) and distinct_atoms(f) and distinct_atoms(g)


def _one_to_one(f: Tensor, g: Tensor) -> bool:
    """Whether each atom of one factor meets one of the other, everywhere the same."""
    if support(f) != support(g):
        return False
    counts = [int(numbered(parts).max()) for parts in ([f], [g], [f, g])]
    return counts[0] == counts[1] == counts[2]


def _tied(ledger: Ledger, f: Tensor, g: Tensor, where: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Tie two factors at the positions at which they meet.

    Returns:
        The factor of the result, and sites that distinguish atoms that meet one atom at one site.
    """
    f, g, where = torch.broadcast_tensors(f, g, where)  # type: ignore[no-untyped-call]
    both = (f != NONE) & (g != NONE)
    ranks = []
    for one, other in ((f, g), (g, f)):
        rank = torch.zeros(f.shape, dtype=torch.int64)
        rank[both] = _rank_among_equals(numbered([one[both], where[both]]), other[both])
        if rank.any():
            ranks.append(compact(rank))
    ledger.tie(f, g, numbered([where, *ranks]))
    return compact(torch.where(f != NONE, f, g)), ranks


def _rank_among_equals(key: Tensor, value: Tensor) -> Tensor:
    """Number the values with the same key, in the order of their first position."""
    if not key.numel() or int(key.max()) + 1 == key.numel():
        return torch.zeros_like(key)
    pairs = numbered([key, value])
    count = int(pairs.max()) + 1
    if count == int(key.max()) + 1:
        return torch.zeros_like(key)
    positions = torch.arange(len(pairs))
    first = torch.full((count,), len(pairs)).scatter_reduce_(0, pairs, positions, "amin")
    key_of = key[first]
    order = torch.argsort(key_of * len(pairs) + first)
    sorted_keys = key_of[order]
    new = torch.ones(count, dtype=torch.bool)
    new[1:] = sorted_keys[1:] != sorted_keys[:-1]
    starts = torch.cummax(torch.where(new, torch.arange(count), 0), 0).values
    rank = torch.empty(count, dtype=torch.int64)
    rank[order] = torch.arange(count) - starts
    return rank[pairs]


# -- over axes -------------------------------------------------------------------------------------


def reduce(ledger: Ledger, x: Labels, over: Axes, why: str) -> Labels:
    """Combine the elements along the axes ``over``, now of length 1, whatever their order."""
    shape = [1 if axis in over else size for axis, size in enumerate(x.shape)]
    factors, sites = [], list(fibres(x.sites, over))
    for factor in x.factors:
        axes = support(factor)
        if not axes & over:
            factors.append(factor)
        elif axes <= over:
            ledger.colour(factor, pattern(x.sites, axes, x.rank))
        elif not _covered(ledger, x, factor, over):
            kept, place = _crossed(ledger, x, factor, over)
            factors += kept
            sites.append(place)
    return made(shape, factors, sites, x.cause or why)


def _covered(ledger: Ledger, x: Labels, factor: Tensor, over: Axes) -> bool:
    """Whether the atoms that a position sums over follow from another factor's atom there.

    So it is for the weight of a grouped convolution, whose filters name their group.
    """
    axes = support(factor) - over
    owners = (other for other in x.factors if support(other) == axes and distinct_atoms(other))
    owner = next(owners, None)
    if owner is None or not combined(ledger, owner, factor):
        return False
    ledger.colour(factor, pattern(x.sites, support(factor) & over, x.rank))
    return True


def combined(ledger: Ledger, f: Tensor, g: Tensor) -> bool:
    """Whether the atoms of two factors occur in all combinations, possibly only within blocks.

    Blocks are demanded to stay.
    """
    of_f, i = torch.unique(f, return_inverse=True)
    of_g, j = torch.unique(g, return_inverse=True)
    i, j = torch.broadcast_tensors(i, j)  # type: ignore[no-untyped-call]
    together = torch.zeros(len(of_f), len(of_g), dtype=torch.bool)
    together[i.flatten(), j.flatten()] = True
    if together.all():
        return True
    # Elements without a unit must occur with all.
    rest_f, rest_g = of_f != NONE, of_g != NONE
    if not (together[~rest_f].all() and together[:, ~rest_g].all()):
        return False
    of_f, of_g, together = of_f[rest_f], of_g[rest_g], together[rest_f][:, rest_g]
    if together.all():
        return True
    rows, block = torch.unique(together, dim=0, return_inverse=True)
    columns = rows.sum(dim=1)
    if int(rows.sum(dim=0).max()) > 1 or len(set(columns.tolist())) > 1:
        return False
    members = [of_f[block == k] for k in range(len(rows))]
    if len({len(part) for part in members}) > 1:
        return False
    order = sorted(range(len(rows)), key=lambda k: int(members[k][0]))
    ledger.partition(
        torch.stack([members[k] for k in order]), torch.stack([of_g[rows[k]] for k in order])
    )
    return True


def _crossed(ledger: Ledger, x: Labels, factor: Tensor, over: Axes) -> tuple[list[Tensor], Tensor]:
    """Sum over some of the axes along which a factor changes.

    Two kinds of permutation go with that: those that keep the atoms of each sum (group norm), and
    those that exchange the sums as a whole (the paths of split attention). What has more of them
    is kept.
    """
    axes = support(factor)
    rows = _rows_of(factor, axes - over)
    sums, terms = rows.shape
    kept_shape = [1 if axis in over else size for axis, size in enumerate(factor.shape)]
    where = pattern(x.sites, axes, x.rank).expand(factor.shape)
    place = torch.arange(sums).view(kept_shape)
    inside = sums * math.lgamma(terms + 1)
    if not distinct_atoms(factor) or inside >= math.lgamma(sums + 1):
        ledger.colour(factor, numbered([where, place]))
        return [], place
    where = _rows_of(where, axes - over)
    for term in range(terms):
        mark = numbered([where[:, term], where[:, 0]]) * terms + term
        ledger.tie(rows[:, 0], rows[:, term], mark if term else where[:, 0])
    return [rows[:, 0].reshape(kept_shape)], torch.zeros_like(place)


def _rows_of(part: Tensor, axes: Axes) -> Tensor:
    """Return (positions along ``axes``, all others)."""
    order = [*sorted(axes), *(a for a in range(part.ndim) if a not in axes)]
    return part.permute(order).reshape(math.prod(part.shape[a] for a in axes), -1)


def distinct_atoms(atoms: Tensor) -> bool:
    """Whether every element is an atom, and no two the same."""
    return bool((atoms != NONE).all()) and atoms.unique().numel() == atoms.numel()  # type: ignore[no-untyped-call]


def normalise(ledger: Ledger, x: Labels, over: Axes, why: str) -> Labels:
    """Combine each element with a function of all elements along the axes ``over``."""
    return meet(ledger, x, reduce(ledger, x, over, why), why)


# -- sums of products ------------------------------------------------------------------------------


def contract(
    ledger: Ledger, a: Labels, b: Labels, axis: int, why: str, batch: Axes = frozenset()
) -> Labels:
    """Sum the products of ``a`` and ``b``, broadcast to one shape, along ``axis``, now of length 1.

    Args:
        ledger: Takes the demands.
        a: Of the rank of ``b``; of length 1 along the axes of the result that ``b`` has.
        b: Likewise.
        axis: The axis along which both are long.
        why: Description of the operation.
        batch: Axes along which the sums are formed one by one.
    """
    line = frozenset((axis,)) | batch
    lines, rests = [], []
    for x in (a, b):
        for factor in x.factors:
            if axis in support(factor) and not support(factor) <= line:
                x = demote(ledger, x, factor, why)
        inside = tuple(f for f in x.factors if axis in support(f))
        outside = tuple(f for f in x.factors if axis not in support(f))
        where = pattern(x.sites, line, x.rank)
        shape = [size if a in line else 1 for a, size in enumerate(x.shape)]
        lines.append(Labels(torch.Size(shape), inside, tidy([where]), x.cause))
        short = torch.Size(1 if a == axis else size for a, size in enumerate(x.shape))
        rests.append(Labels(short, outside, fibres(x.sites, frozenset((axis,))), x.cause))
    met = meet(ledger, lines[0], lines[1], why)
    summed = reduce(ledger, met, frozenset((axis,)), why)
    return meet(ledger, meet(ledger, rests[0], rests[1], why), summed, why)


# -- along axes in which every position has its meaning --------------------------------------------


def spread(ledger: Ledger, x: Labels, over: Axes, shape: Sequence[int], why: str) -> Labels:
    """Make elements of ``shape`` that each depend differently on all elements along ``over``.

    The other axes are those of ``x``.
    """
    x = confine(ledger, x, over, why)
    sites = (*fibres(x.sites, over), *grid(shape, over))
    return Labels(torch.Size(shape), x.factors, tidy(sites), x.cause)


def per_channel(ledger: Ledger, x: Labels, channels: Labels, why: str) -> Labels:
    """Combine ``x`` (N, C, …) with ``channels`` (C,)."""
    return meet(ledger, x, channels.viewed([-1, *[1] * (x.rank - 2)]), why)
