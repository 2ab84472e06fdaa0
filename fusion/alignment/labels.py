"""Labels of tensor elements: the units to which each belongs, and its place in them.

A symmetry permutes *atoms*: the positions along the axes of parameters (`ledger`). An element of an
activation belongs to one atom, its channel; an element of a weight to two, the channel it makes and
the one it takes; an element of the input to none. Each of these is a *factor*: a tensor of atoms, 0
where there is none. Other positions of an element, such as the pixel, are the *sites*, integers
too. The two laws of a labelled tensor are

1. elements with the same atoms and sites hold the same value;
2. a symmetry takes the element of atoms (a, b, …) and sites s to one of atoms (ga, gb, …) and
   sites s.

Operations that only move data act on the labels as on the data; all others state their demands on
the atoms (`ledger`), so that the second law holds for their result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NONE = 0  # the atom of elements that belong to no unit
Axes = frozenset[int]


@dataclass(frozen=True, eq=False)
class Labels:
    """Atoms and sites of the elements of one tensor.

    Attributes:
        shape: That of the tensor.
        factors: Tensors of atoms, each with length 1 along the axes along which it does not change.
        sites: Tensors of integers in the same form; two elements are at one site if all agree.
        cause: The reason why elements without a unit belong to none.
    """

    shape: torch.Size
    factors: tuple[Tensor, ...] = ()
    sites: tuple[Tensor, ...] = ()
    cause: str = ""

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """Return ``axis`` counted from the front."""
        return axis % max(self.rank, 1)

    def axes(self, axes: int | Iterable[int]) -> Axes:
        """Return ``axes`` counted from the front."""
        return frozenset(self.axis(a) for a in ([axes] if isinstance(axes, int) else axes))

    def changed(
        self, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None
    ) -> Labels:
        """Apply a change of layout, given for tensors of the full shape, to all labels."""
        factors = [change(part.expand(self.shape)) for part in self.factors]
        sites = [change(part.expand(self.shape)) for part in self.sites]
        if shape is None:
            shape = change(torch.empty((), device="meta").expand(self.shape)).shape
        return made(shape, factors, sites, self.cause)

    def viewed(self, shape: Sequence[int]) -> Labels:
        """Return the labels of the same elements, in order, as a tensor of another shape."""
        shape = list(shape)
        if shape == list(self.shape):
            return self
        if -1 in shape:
            rest = math.prod(size for size in shape if size != -1)
            shape[shape.index(-1)] = math.prod(self.shape) // max(rest, 1)
        factors = [_viewed(part, self.shape, shape) for part in self.factors]
        sites = [_viewed(part, self.shape, shape) for part in self.sites]
        return made(shape, factors, sites, self.cause)

    def lifted(self, rank: int) -> Labels:
        """Return the same with axes of length 1 in front, ``rank`` in total."""
        if rank == self.rank:
            return self
        ones = (1,) * (rank - self.rank)
        return Labels(
            torch.Size(ones + self.shape),
            tuple(part.reshape(ones + part.shape) for part in self.factors),
            tuple(part.reshape(ones + part.shape) for part in self.sites),
            self.cause,
        )

    def expanded(self, shape: Sequence[int]) -> Labels:
        """Return the same, repeated along axes of length 1."""
        return replace(self, shape=torch.Size(shape))

    def with_sites(self, *more: Tensor) -> Labels:
        """Return the same with further sites."""
        return replace(self, sites=tidy((*self.sites, *more)))


def made(
    shape: Sequence[int], factors: Iterable[Tensor], sites: Iterable[Tensor], cause: str = ""
) -> Labels:
    """Return labels in their simplest form: no factor without an atom, no site twice."""
    kept = tuple(part for part in map(compact, factors) if bool((part != NONE).any()))
    return Labels(torch.Size(shape), kept, tidy(map(compact, sites)), cause)


def distinct(shape: Sequence[int], cause: str) -> Labels:
    """Return labels of elements that belong to no unit and are all different."""
    return Labels(torch.Size(shape), (), grid(shape, range(len(shape))), cause)


def alike(shape: Sequence[int]) -> Labels:
    """Return labels of elements that belong to no unit and are all equal."""
    return Labels(torch.Size(shape))


def grid(shape: Sequence[int], axes: Iterable[int]) -> tuple[Tensor, ...]:
    """Return sites that distinguish the positions along ``axes``."""
    return tuple(along(torch.arange(shape[a]), a, len(shape)) for a in axes if shape[a] > 1)


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Return (n,) ``values`` as a tensor of ``rank`` axes that changes along ``axis``."""
    return values.view([-1 if a == axis else 1 for a in range(rank)])


def _viewed(part: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """View ``part``, one label of a tensor of shape ``old``, as one of a tensor of shape ``new``.

    Axes are split and merged in groups of equal size; where the label does not change along a
    group, it does not along the new axes either: an image of any size costs its channels only.
    """
    within: list[int] = []
    shape: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        sizes = [1, 1]
        while sizes[0] != sizes[1] or (start, begin) == (i, j):
            if i < len(old) and (sizes[0] <= sizes[1] or j == len(new)):
                sizes[0] *= old[i]
                i += 1
            else:
                sizes[1] *= new[j]
                j += 1
        changes = any(size > 1 for size in part.shape[start:i])
        within += old[start:i] if changes else [1] * (i - start)
        shape += new[begin:j] if changes else [1] * (j - begin)
    return part.expand(within).reshape(shape)


# -- the axes along which a label changes ----------------------------------------------------------


def support(part: Tensor) -> Axes:
    """Return the axes along which ``part`` changes."""
    return frozenset(axis for axis, size in enumerate(part.shape) if size > 1)


def compact(part: Tensor) -> Tensor:
    """Return ``part`` with length 1 along every axis along which it does not change."""
    for axis, stride in enumerate(part.stride()):
        if stride == 0 and part.shape[axis] > 1:
            part = part.narrow(axis, 0, 1)
    for axis, size in enumerate(part.shape):
        if size > 1:
            first = part.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(part), part):
                part = first
    return part


def numbered(parts: Sequence[Tensor]) -> Tensor:
    """Number the combinations of values that meet when ``parts`` are broadcast: 0, 1, ….

    A tensor of one element for no parts.
    """
    if not parts:
        return torch.zeros((), dtype=torch.int64)
    total, *rest = parts
    for part in rest:
        total = total * (int(part.max()) + 1) + part
        if part is not rest[-1]:
            total = torch.unique(total, return_inverse=True)[1]
    number: Tensor = torch.unique(total, return_inverse=True)[1]
    return number


def tidy(sites: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Merge sites that change along the same axes, and drop those that do not change."""
    by_support: dict[Axes, Tensor] = {}
    for site in sites:
        where = support(site)
        if not where:
            continue
        known = by_support.get(where)
        if known is None:
            by_support[where] = site
        elif known is not site and not torch.equal(known, site):
            by_support[where] = numbered([known, site])
    return tuple(by_support.values())


def pattern(sites: Sequence[Tensor], axes: Axes, rank: int) -> Tensor:
    """Number the positions along ``axes`` by the sites that they hold along all other axes.

    Returns:
        Of ``rank`` axes, of length 1 except along ``axes``; two positions have the same number if
        they hold the same sites at the same places.
    """
    parts = [site for site in sites if support(site) <= axes]
    crossing = [site for site in sites if support(site) & axes and not support(site) <= axes]
    if crossing:
        parts.append(_rows(numbered(crossing), axes))
    number = numbered(tidy(parts))
    return number if number.ndim == rank else number.view([1] * rank)


def fibres(sites: Sequence[Tensor], over: Axes) -> tuple[Tensor, ...]:
    """Return sites that distinguish elements by their labels along ``over``, now of length 1."""
    kept = [site for site in sites if not support(site) & over]
    crossing = [site for site in sites if support(site) & over and not support(site) <= over]
    if crossing:
        joint = numbered(crossing)
        kept.append(_rows(joint, support(joint) - over))
    return tidy(kept)


def _rows(joint: Tensor, axes: Axes) -> Tensor:
    """Number the positions along ``axes`` by the values of ``joint`` along the others."""
    order = [*sorted(axes & support(joint)), *sorted(support(joint) - axes)]
    order += [a for a in range(joint.ndim) if a not in order]
    kept = [joint.shape[a] for a in sorted(axes & support(joint))]
    rows = joint.permute(order).reshape(math.prod(kept), -1)
    number: Tensor = torch.unique(rows, dim=0, return_inverse=True)[1]
    shape = [joint.shape[a] if a in axes else 1 for a in range(joint.ndim)]
    return number.view(shape)
