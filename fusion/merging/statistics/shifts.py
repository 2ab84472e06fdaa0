"""Gram matrices of input patches from products of shifted inputs, without unfolding patches.

Two kernel positions t and u meet in a Gram matrix as the sum over output positions of the products
of the input's channels at the two places that t and u read. Two other positions at the same
distance give the same products, except for those at the edge of the image: a 3×3 kernel of stride 1
has 81 pairs of positions and 13 distances (up to a sign). So each distance is multiplied once, in
cells: the interior, which all its pairs share, and the parts that only some of them contain. With a
stride the input falls into phases, and pairs share products where their phases agree, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.statistics.products import BYTES, ROWS, add_symmetric_product, mirrored
from fusion.merging.statistics.reading import Axis

Distance = tuple[int, int, int]
"""(phase of the first position, phase of the second, difference of their offsets)"""


@dataclass(frozen=True)
class _Pairs:
    """The pairs of kernel positions of one distance, along one axis.

    Attributes:
        distance: their common distance.
        segments: pieces (start, stop) of the first position's phase, in order.
        pairs: (first position, second position, numbers of the segments that it sums over).
    """

    distance: Distance
    segments: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int, range], ...]


_Copy = tuple[int, tuple[slice, ...]]
"""A phase of the first axis, and a part of the others."""


@dataclass(frozen=True)
class _Operand:
    """A box of the input: rows ``start`` to ``stop`` of a phase of the first axis, and the rest."""

    phase: int
    start: int
    stop: int
    others: tuple[slice, ...]

    @property
    def copy(self) -> _Copy:
        """Operands of one copy are rows of the same contiguous tensor."""
        return self.phase, self.others


@dataclass(frozen=True)
class _Cell:
    """One product: of two boxes of the input, the same one twice where it is symmetric."""

    left: _Operand | None
    right: _Operand | None
    symmetric: bool

    @property
    def copies(self) -> list[_Copy]:
        """The copies that contain the rows of the operands: at most two."""
        both = [operand.copy for operand in (self.left, self.right) if operand is not None]
        return both if both[:1] != both[1:] else both[:1]


class ShiftedProducts:
    """Sums of products of patches, by the distance between positions of the kernel.

    Args:
        axes: how the layer reads its input; none for a layer that reads single positions.
        groups: g, of the layer.
        channels: c, input channels in each group.
        device: device of the sums.
        limit: bytes that rearranged parts of the input may take.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        groups: int,
        channels: int,
        *,
        device: torch.device | str = "cpu",
        limit: int = BYTES,
    ) -> None:
        self._axes = tuple(axes)
        self._groups, self._channels = groups, channels
        self._limit = limit
        self._taps = torch.Size([len(axis.taps) for axis in axes])
        self._cells: list[_Cell] = []
        self._blocks: list[tuple[int, int, list[int], bool]] = []
        self._plan()
        # Cells of the same copies follow each other.
        self._order = sorted(
            range(len(self._cells)), key=lambda n: sorted(map(str, self._cells[n].copies))
        )
        empty = {"dtype": torch.float64, "device": device}
        self._sums = [torch.zeros(groups, channels, channels, **empty) for _ in self._cells]  # type: ignore[call-overload]
        self._inputs = torch.zeros(groups, *(axis.size for axis in axes), channels, **empty)  # type: ignore[call-overload]

    def add(self, values: Tensor) -> None:
        """Add the patches of (n, g, c, *sizes), in float32 or float64."""
        across = torch.Size(values.shape[3:]).numel()
        per_image = max(1, self._copied_values() * values.element_size())
        images = max(1, min(self._limit // per_image, ROWS // across))
        for part in torch.split(values, images):
            self._add(part.permute(1, *range(3, part.ndim), 0, 2))

    def total(self) -> Tensor:
        """Return the sums of x̃ᵀx̃ over patches and positions, (g, d + 1, d + 1) in float64.

        The last entry, the number of positions, is left at 0: padding has no place here.
        """
        taps = self._taps.numel()
        size = self._channels * taps + 1
        total: Tensor = self._inputs.new_zeros(self._groups, size, size)
        blocks = torch.unflatten(torch.unflatten(total[:, :-1, :-1], 2, (-1, taps)), 1, (-1, taps))
        for first, second, cells, symmetric in self._blocks:
            block = sum((self._sums[cell] for cell in cells[1:]), start=self._sums[cells[0]])
            block = mirrored(block) if symmetric else block
            blocks[:, :, first, :, second] = block
            blocks[:, :, second, :, first] = block.mT
        means = torch.unflatten(total[:, :-1, -1], 1, (-1, taps))
        for number, position in enumerate(itertools.product(*map(range, self._taps))):
            window = tuple(
                _actual(_window(axis, t), axis)
                for t, axis in zip(position, self._axes, strict=True)
            )
            values = self._inputs[(slice(None), *window)]
            means[:, :, number] = values.flatten(1, -2).sum(1) if window else values
        total[:, -1, :-1] = total[:, :-1, -1]
        return total

    @property
    def products(self) -> float:
        """Multiply-adds for one image, in units of g · c²."""
        count = 0.0
        for cell in self._cells:
            rows = 1 if cell.left is None else cell.left.stop - cell.left.start
            for part in () if cell.left is None else cell.left.others:
                rows *= len(range(part.start, part.stop, part.step))
            count += rows / 2 if cell.symmetric else rows
        return count

    def _add(self, laid: Tensor) -> None:
        """Add the patches of (g, *sizes, n, c)."""
        self._inputs.add_(laid.sum(-2))
        copies: list[tuple[_Copy, Tensor]] = []  # at most two, of which several cells are made

        def rows(operand: _Operand | None) -> Tensor:
            if operand is None:
                return laid
            copy = next(tensor for key, tensor in copies if key == operand.copy)
            return copy[:, operand.start : operand.stop].flatten(1, -2)

        for number in self._order:
            cell, total = self._cells[number], self._sums[number]
            copies = [kept for kept in copies if kept[0] in cell.copies]
            there = [key for key, _ in copies]
            copies += [(key, self._copied(laid, key)) for key in cell.copies if key not in there]
            if cell.symmetric:
                add_symmetric_product(total, rows(cell.left))
            else:
                total.add_(rows(cell.left).mT @ rows(cell.right))

    def _copied(self, laid: Tensor, copy: _Copy) -> Tensor:
        phase, others = copy
        where = (slice(None), slice(phase, None, self._axes[0].stride), *others)
        return laid[where].contiguous()

    def _copied_values(self) -> int:
        """Return the number of values of an image that are copied at a time."""

        def values(copy: _Copy) -> int:
            rows = -(-self._axes[0].size // self._axes[0].stride)
            across = [len(range(part.start, part.stop, part.step)) for part in copy[1]]
            return self._groups * self._channels * rows * math.prod(across)

        return max((sum(map(values, cell.copies)) for cell in self._cells), default=0)

    def _plan(self) -> None:
        """Find the cells, and those over which each pair of kernel positions sums."""
        for pairs in itertools.product(*map(_pairs_by_distance, self._axes)):
            distance = [p.distance for p in pairs]
            opposite = [(second, first, -shift) for first, second, shift in distance]
            if distance > opposite:
                continue  # the transposes of another distance's products
            symmetric = distance == opposite
            first = len(self._cells)
            self._cells += [self._cell(pairs, place, symmetric) for place in _places(pairs)]
            shape = [len(p.segments) for p in pairs]
            for chosen in itertools.product(*(p.pairs for p in pairs)):
                cells = [
                    first + _flat(place, shape)
                    for place in itertools.product(*(within for _, _, within in chosen))
                ]
                left = _flat([t for t, _, _ in chosen], self._taps)
                right = _flat([u for _, u, _ in chosen], self._taps)
                self._blocks.append((left, right, cells, symmetric))

    def _cell(self, pairs: Sequence[_Pairs], place: Sequence[int], symmetric: bool) -> _Cell:
        if not self._axes:
            return _Cell(None, None, symmetric)
        lefts, rights = [], []
        for p, number in zip(pairs, place, strict=True):
            start, stop = p.segments[number]
            phase, other, shift = p.distance
            lefts.append((phase, start, stop))
            rights.append((other, start + shift, stop + shift))
        left, right = (self._operand(windows) for windows in (lefts, rights))
        return _Cell(left, right, symmetric)

    def _operand(self, windows: Sequence[tuple[int, int, int]]) -> _Operand:
        others = zip(windows[1:], self._axes[1:], strict=True)
        return _Operand(*windows[0], tuple(_actual(window, axis) for window, axis in others))


def _window(axis: Axis, tap: int) -> tuple[int, int, int]:
    """Return the phase of a kernel position, and which part (start, stop) of it the outputs read.

    The value i of phase p is the input at ``i * stride + p``.
    """
    phase, offset = axis.taps[tap] % axis.stride, axis.taps[tap] // axis.stride
    length = -(-(axis.size - phase) // axis.stride)
    start = max(offset, 0)
    return phase, start, max(start, min(offset + axis.outputs, length))


def _actual(window: tuple[int, int, int], axis: Axis) -> slice:
    """Return the part of the input for a part (phase, start, stop) of a phase."""
    phase, start, stop = window
    first = start * axis.stride + phase
    return slice(first, max(first, (stop - 1) * axis.stride + phase + 1), axis.stride)


def _pairs_by_distance(axis: Axis) -> list[_Pairs]:
    found: dict[Distance, list[tuple[int, int, int, int]]] = {}
    for first, second in itertools.product(range(len(axis.taps)), repeat=2):
        phase, start, stop = _window(axis, first)
        other, other_start, other_stop = _window(axis, second)
        shift = axis.taps[second] // axis.stride - axis.taps[first] // axis.stride
        # outputs that read the input, and not padding, at both positions
        start, stop = max(start, other_start - shift), min(stop, other_stop - shift)
        if start < stop:
            found.setdefault((phase, other, shift), []).append((first, second, start, stop))
    by_distance = []
    for distance, windows in found.items():
        ends = sorted({end for _, _, start, stop in windows for end in (start, stop)})
        pairs = tuple((t, u, range(ends.index(a), ends.index(b))) for t, u, a, b in windows)
        by_distance.append(_Pairs(distance, tuple(itertools.pairwise(ends)), pairs))
    return by_distance


def _places(pairs: Sequence[_Pairs]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(p.segments)) for p in pairs))


def _flat(place: Sequence[int], shape: Sequence[int]) -> int:
    number = 0
    for at, size in zip(place, shape, strict=True):
        number = number * size + at
    return number
