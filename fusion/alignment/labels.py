"""Labels on activations: which unit, and which site of it, every element of a tensor holds.

Every element of an activation carries two integers. Its *unit* is the channel it belongs to; its
*site* tells the elements of one unit apart (the pixel, before or after a flatten). A permutation
symmetry exchanges units and leaves sites alone. Operations that only move data run on the label
tensors themselves; other operations state what they demand: that two units be one (``tie``), that a
unit stay where it is (``fix``), or that exchanged units look alike in some tensor (``colour``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = 0  # the label of everything that may not move: inputs, outputs, unproven operations


@dataclass(frozen=True, eq=False)
class Labels:
    """Unit and site of every element of one activation, both of the activation's shape.

    Axes along which a label does not change have stride 0, so that an image of any size costs
    little more than its channels (see `compact`).
    """

    units: Tensor
    sites: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the activation."""
        return self.units.shape


@dataclass(frozen=True, eq=False)
class Vector:
    """The labels along one axis of an activation whose other axes do not matter.

    ``patterns`` numbers the arrangements of sites: positions may be exchanged only where these
    agree.
    """

    labels: Tensor
    patterns: Tensor


@dataclass(frozen=True, eq=False)
class Use:
    """One axis of a parameter and the units that stand along it.

    ``rows`` bounds the rows of axis 0 to which an entry on axis 1 applies (a grouped convolution
    keeps the inputs of each group in rows of their own); ``None`` means all of them.
    """

    tensor: str
    axis: int
    rows: tuple[int, int] | None
    labels: Tensor
    marks: Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of channels into blocks of equal structure, each row of ``sides`` one block.

    ``sides`` holds label tensors of shape (blocks, units per block): the inputs and the outputs
    of a grouped convolution, or the channels of a group norm.
    """

    operation: str
    sides: tuple[Tensor, ...]


@dataclass
class Ledger:
    """Everything that the operations of one network demand of its units."""

    count: int = 1  # labels handed out; 0 is `FIXED`
    ties: list[Tensor] = field(default_factory=list)  # each (2, n): these labels are one unit
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)  # labels, operation
    colourings: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # labels, marks
    blocks: list[Blocks] = field(default_factory=list)
    uses: dict[tuple[str, int, tuple[int, int] | None], Use] = field(default_factory=dict)
    _seen: set[tuple[int, int]] = field(default_factory=set)
    _alive: list[Labels] = field(default_factory=list)  # keeps the identities in _seen unique

    def fresh(self, n: int) -> Tensor:
        """Return ``n`` labels that nothing carries yet."""
        labels = torch.arange(self.count, self.count + n)
        self.count += n
        return labels

    def tie(self, a: Tensor, b: Tensor, why: str) -> None:
        """Demand that, position by position, the labels ``a`` and ``b`` be one unit."""
        pairs = torch.stack([part.flatten() for part in _broadcast(a, b)])
        bound = (pairs == FIXED).any(dim=0)
        if bound.any():
            self.fix(pairs[:, bound], why)
            pairs = pairs[:, ~bound]
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel():
            self.ties.append(pairs)

    def fix(self, labels: Tensor, why: str) -> None:
        """Demand that the units ``labels`` stay in place, because of the operation ``why``."""
        labels = core(labels).flatten()
        labels = labels[labels != FIXED]
        if labels.numel():
            self.fixed.append((labels, why))

    def colour(self, labels: Tensor, marks: Tensor) -> None:
        """Demand that units be exchanged only if they carry the same ``marks`` in this tensor."""
        if (labels != FIXED).any():
            self.colourings.append((labels, marks))

    def see(self, value: Labels) -> None:
        """Demand that a symmetry act on the activation ``value``: equal sites for its units."""
        identity = (id(value.units), id(value.sites))
        if identity in self._seen:
            return
        self._seen.add(identity)
        self._alive.append(value)
        units, sites = core(value.units), core(value.sites)
        if any(u > 1 and s > 1 for u, s in zip(units.shape, sites.shape, strict=True)):
            units, sites = _broadcast(units, sites)
            self.colour(units.flatten(), sites.flatten())
        else:  # all units have the same sites: only their presence tells
            self.colour(units.flatten(), torch.zeros_like(units).flatten())

    def vector(self, value: Labels, axis: int, why: str) -> Vector:
        """Return the labels along ``axis``; if they also change elsewhere, fix them first."""
        axis %= len(value.shape)
        length = value.shape[axis]
        units, sites = core(value.units), core(value.sites)
        none = torch.zeros(length, dtype=torch.int64)
        if any(size > 1 for i, size in enumerate(units.shape) if i != axis):
            self.fix(units, why)
            return Vector(none, none)
        labels = units.flatten().expand(length)
        patterns = none
        if sites.shape[axis] > 1:
            columns = sites.movedim(axis, 0).flatten(1)
            patterns = torch.unique(columns, dim=0, return_inverse=True)[1]
        self.colour(labels, patterns)
        return Vector(labels, patterns)

    def use(
        self, tensor: str, axis: int, vector: Vector, why: str, rows: tuple[int, int] | None = None
    ) -> None:
        """Record that the units of ``vector`` stand along ``axis`` of the parameter ``tensor``."""
        key = (tensor, axis, rows)
        before = self.uses.setdefault(key, Use(*key, vector.labels, vector.patterns))
        if before.labels is vector.labels:
            return
        self.tie(before.labels, vector.labels, why)
        if not torch.equal(before.marks, vector.patterns):
            self.fix(vector.labels, why)


def core(labels: Tensor) -> Tensor:
    """Return ``labels`` with every axis of stride 0 narrowed to length 1."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(labels: Tensor) -> Tensor:
    """Return ``labels`` as a view that has stride 0 on each axis along which nothing changes."""
    shape, inner = labels.shape, core(labels)
    for axis, size in enumerate(inner.shape):
        if size > 1:
            first = inner.narrow(axis, 0, 1)
            if torch.equal(first.expand_as(inner), inner):
                inner = first
    return inner.expand(shape)


def constant(label: int, shape: Sequence[int]) -> Labels:
    """Return an activation all of whose elements carry ``label``."""
    return Labels(torch.full([1] * len(shape), label).expand(*shape), grid(shape, None))


def channelwise(vector: Vector, shape: Sequence[int], axis: int) -> Labels:
    """Return an activation of ``shape`` with ``vector`` along ``axis`` and sites of its own."""
    axis %= len(shape)
    along = [1] * len(shape)
    along[axis] = shape[axis]
    sites = grid(shape, axis)
    if vector.patterns.any():
        rest = math.prod(shape) // shape[axis]
        sites = vector.patterns.view(along) * rest + core(sites)
    return Labels(compact(vector.labels.view(along).expand(*shape)), sites.expand(*shape))


def join(values: Sequence[Labels], axis: int) -> Labels:
    """Return the labels of the concatenation of ``values`` along ``axis``."""
    sites = [value.sites for value in values]
    owners = [set(core(value.units).flatten().tolist()) - {FIXED} for value in values]
    if sum(map(len, owners)) > len(set().union(*owners)):
        # One unit stands in several parts, with different contents: its copies are further sites.
        sites = [_offset(site, i, len(values)) for i, site in enumerate(sites)]
    return Labels(_concatenate([value.units for value in values], axis), _concatenate(sites, axis))


def merge_sites(a: Tensor, b: Tensor) -> Tensor:
    """Number the pairs of sites that meet when two activations are combined elementwise."""
    if b.numel() == 1 or (a.shape == b.shape and torch.equal(a, b)):
        return a
    if a.numel() == 1:
        return b
    pairs = a * (int(b.max()) + 1) + b
    numbers: Tensor = torch.unique(pairs, return_inverse=True)[1]
    return numbers


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.expand(shape), b.expand(shape)


def _offset(sites: Tensor, part: int, parts: int) -> Tensor:
    return (core(sites) * parts + part).expand(sites.shape)


def _concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    axis %= parts[0].ndim
    lengths = [part.shape[axis] for part in parts]
    shape = list(parts[0].shape)
    shape[axis] = sum(lengths)
    cores = [core(part) for part in parts]
    common = [max(sizes) for sizes in zip(*(c.shape for c in cores), strict=True)]
    full = []
    for inner, length in zip(cores, lengths, strict=True):
        common[axis] = length
        full.append(inner.expand(common))
    return compact(torch.cat(full, dim=axis).expand(shape))


def grid(shape: Sequence[int], without: int | None) -> Tensor:
    """Number the positions of ``shape``, the same along the axis ``without``."""
    sizes = [1 if axis == without else size for axis, size in enumerate(shape)]
    return compact(torch.arange(math.prod(sizes)).view(sizes).expand(*shape))
