"""Layout of a layer's input patches: the values multiplied by the weight's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Axis:
    """One spatial dimension along which the kernel has more than one position.

    For its position t the output j reads the input at ``j * stride + taps[t]``, and 0 where that
    lies outside of the input.

    Attributes:
        taps: one number for each position of the kernel, evenly spaced.
        stride: distance between the inputs of neighbouring outputs.
        size: length of the input.
        outputs: length of the output.
    """

    taps: tuple[int, ...]
    stride: int
    size: int
    outputs: int


@dataclass(frozen=True, eq=False)
class Reading:
    """The input of one call of a layer.

    The input patch of an output position holds, for each channel of a group and each position of
    the kernel, the value that the weight multiplies there; its entries have the order of the
    columns of :meth:`Piece.matrices <fusion.merging.Piece.matrices>`.

    Attributes:
        values: (n, g, c, *sizes of the axes), c input channels in each of g groups.
        axes: the spatial dimensions along which the kernel extends; the others are part of n.
        positions: number of output positions in all images, zero padding included.
    """

    values: Tensor
    axes: tuple[Axis, ...]
    positions: int


def read_input(module: nn.Module, values: Tensor, output: Tensor) -> Reading:
    """Return the layout in which ``module`` read ``values`` to compute ``output``.

    A transposed convolution is read as the convolution of stride 1 that it equals: of the input
    with zeros inserted between its values, by the reversed kernel. An output position that few
    positions of the kernel reach has zeros in the rest of its patch.

    Args:
        module: a linear layer or a convolution, transposed or not.
        values: its input; a convolution's without the batch dimension, too.
        output: its output, of which only the shape matters.
    """
    if not isinstance(module, _ConvNd):
        rows = values.reshape(-1, 1, values.shape[-1])
        return Reading(rows, (), len(rows))
    dims = len(module.kernel_size)
    outputs = output.shape[-dims:]
    if values.ndim == dims + 1:
        values = values[None]
    positions = len(values) * outputs.numel()
    before = _padding_before(module)
    if module.padding_mode != "zeros":
        values = _padded(module, values, before)
        before = [0] * dims
    stride = list(module.stride)
    direction = 1
    if isinstance(module, _ConvTransposeNd):
        values = _with_zeros_between(values, stride)
        stride, direction, before = [1] * dims, -1, [-p for p in before]
    axes = tuple(
        Axis(
            taps=tuple(direction * t * module.dilation[d] - before[d] for t in range(size)),
            stride=stride[d],
            size=values.shape[2 + d],
            outputs=outputs[d],
        )
        for d, size in enumerate(module.kernel_size)
    )
    values, axes = _without_single_taps(values, axes, module.groups)
    return Reading(values, axes, positions)


def _padding_before(module: _ConvNd) -> list[int]:
    """Return how many values are added in front of each axis, or cut off the transposed output."""
    if module.padding == "valid":
        return [0] * len(module.kernel_size)
    if module.padding == "same":
        spans = zip(module.dilation, module.kernel_size, strict=True)
        return [dilation * (size - 1) // 2 for dilation, size in spans]
    return [int(p) for p in module.padding]


def _padded(module: _ConvNd, values: Tensor, before: list[int]) -> Tensor:
    """Return the input padded according to ``padding_mode``."""
    widths: list[int] = []
    for d in reversed(range(len(before))):
        both = 2 * before[d]
        if module.padding == "same":
            both = module.dilation[d] * (module.kernel_size[d] - 1)
        widths += [before[d], both - before[d]]
    return F.pad(values, widths, mode=module.padding_mode)


def _with_zeros_between(values: Tensor, stride: list[int]) -> Tensor:
    if max(stride) == 1:
        return values
    sizes = [(size - 1) * step + 1 for size, step in zip(values.shape[2:], stride, strict=True)]
    spread = values.new_zeros(*values.shape[:2], *sizes)
    where: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    spread[where] = values
    return spread


def _without_single_taps(
    values: Tensor, axes: tuple[Axis, ...], groups: int
) -> tuple[Tensor, tuple[Axis, ...]]:
    """Split the channels into groups, and make axes with one tap a part of n."""
    single = [d for d, axis in enumerate(axes) if len(axis.taps) == 1]
    kept = [d for d in range(len(axes)) if d not in single]
    where: list[slice] = [slice(None)] * (2 + len(axes))
    for d in single:
        axis, (tap,) = axes[d], axes[d].taps
        first = max(0, -(tap // axis.stride))  # the first output whose input is not padding
        last = min(axis.outputs - 1, (axis.size - 1 - tap) // axis.stride)
        start = first * axis.stride + tap
        where[2 + d] = slice(start, max(start, last * axis.stride + tap + 1), axis.stride)
    order = [0, *(2 + d for d in single), 1, *(2 + d for d in kept)]
    values = values[tuple(where)].permute(order)
    values = values.reshape(-1, *values.shape[1 + len(single) :])
    return torch.unflatten(values, 1, (groups, -1)), tuple(axes[d] for d in kept)


def reads_as_torch_does(module: nn.Module, values: Tensor, output: Tensor) -> bool:
    """Return whether ``module`` multiplies its weight by its input the way torch's layers do.

    A subclass with a custom forward pass may pad its input or change its weight first; it is
    compared with the class of torch on the first image.

    Args:
        module: a linear layer or a convolution, of torch or a subclass.
        values: its input.
        output: its output.
    """
    kinds: list[Any] = list(type(module).__mro__)
    origin = next(kind for kind in kinds if kind.__module__.startswith("torch.nn."))
    if kinds[0].forward is origin.forward:
        return True
    if isinstance(module, _ConvTransposeNd) or not len(values):
        return False  # its output may have any size
    expected = origin.forward(module, values[:1])
    if expected.shape != output[:1].shape:
        return False
    return torch.allclose(expected, output[:1], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
