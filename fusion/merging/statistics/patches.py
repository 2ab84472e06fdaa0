"""Gram matrices of input patches laid out side by side, for layers with few channels in a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.merging.statistics.products import BYTES, ROWS, add_symmetric_product, mirrored
from fusion.merging.statistics.reading import Axis


class PatchProducts:
    """Sums of products of patches, which are unfolded a few images at a time (im2col).

    Args:
        axes: how the layer reads its input; at least one.
        groups: g, of the layer.
        channels: c, input channels in each group.
        device: device of the sums.
        limit: bytes that unfolded patches may take.
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
        self._taps = [len(axis.taps) for axis in axes]
        self._channels = channels
        self._limit = limit
        self._columns = channels * torch.Size(self._taps).numel()
        size = self._columns + 1
        self._total = torch.zeros(groups, size, size, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Add the patches of (n, g, c, *sizes), in float32 or float64."""
        # A kernel that runs backwards is unfolded forwards; its columns change places at the end.
        lowest = [min(axis.taps) for axis in self._axes]
        padding = []
        for axis, low in reversed(list(zip(self._axes, lowest, strict=True))):
            last = (axis.outputs - 1) * axis.stride + max(axis.taps)
            padding += [-low, last - (axis.size - 1)]
        padded = F.pad(values, padding)
        for part in self._parts(padded):
            self._add(part)

    def total(self) -> Tensor:
        """Return the sums of x̃ᵀx̃ over patches and positions, (g, d + 1, d + 1) in float64."""
        total = mirrored(self._total)
        backwards = [
            position
            for position, axis in enumerate(self._axes)
            if len(axis.taps) > 1 and axis.taps[1] < axis.taps[0]
        ]
        if not backwards:
            return total
        order = torch.arange(self._columns, device=total.device)
        order = order.view(self._channels, *self._taps).flip([1 + d for d in backwards]).flatten()
        order = torch.cat([order, order.new_tensor([self._columns])])
        return total[:, order][:, :, order]

    def _parts(self, padded: Tensor) -> Iterator[Tensor]:
        """Yield images, and rows of outputs within an image, whose patches are within limits."""
        outputs = [axis.outputs for axis in self._axes]
        across = torch.Size(outputs[1:]).numel()
        per_row = across * padded.shape[1] * (self._columns + 1) * padded.element_size()
        most = max(1, min(self._limit // per_row, ROWS // across))
        images, rows = max(1, most // outputs[0]), min(most, outputs[0])
        axis = self._axes[0]
        reach = max(axis.taps) - min(axis.taps)
        for some in torch.split(padded, images):
            for first in range(0, axis.outputs, rows):
                last = min(first + rows, axis.outputs) - 1
                yield some[:, :, :, first * axis.stride : last * axis.stride + reach + 1]

    def _add(self, padded: Tensor) -> None:
        images, groups, channels, *sizes = padded.shape
        steps = [abs(axis.taps[1] - axis.taps[0]) for axis in self._axes]
        strides = padded.stride()
        reaches = [max(axis.taps) - min(axis.taps) for axis in self._axes]
        outputs = [
            (size - reach - 1) // axis.stride + 1
            for size, reach, axis in zip(sizes, reaches, self._axes, strict=True)
        ]
        view = padded.as_strided(
            (groups, channels, *self._taps, images, *outputs),
            (
                *strides[1:3],
                *(stride * step for stride, step in zip(strides[3:], steps, strict=True)),
                strides[0],
                *(s * axis.stride for s, axis in zip(strides[3:], self._axes, strict=True)),
            ),
        )
        patches = padded.new_empty(groups, self._columns + 1, images * torch.Size(outputs).numel())
        patches[:, : self._columns].view(view.shape).copy_(view)
        patches[:, self._columns] = 1
        add_symmetric_product(self._total, patches.mT)
