"""Symmetric matrices stored as their upper triangles, which take half the memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 512  # columns that are mirrored at once


def to_triangle(matrices: Tensor) -> Tensor:
    """Return the upper triangles of symmetric matrices, (g, c, c) -> (g, c (c + 1) / 2)."""
    size = matrices.shape[-1]
    return torch.cat([matrices[:, row, row:] for row in range(size)], dim=1)


def from_triangle(values: Tensor, size: int) -> Tensor:
    """Return the symmetric matrices of which :func:`to_triangle` took the upper triangles."""
    matrices = values.new_empty(len(values), size, size)
    start = 0
    for row in range(size):
        matrices[:, row, row:] = values[:, start : start + size - row]
        start += size - row
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        matrices[:, last:, first:last] = matrices[:, first:last, last:].mT
        corner = matrices[:, first:last, first:last]
        corner.copy_(corner.triu() + corner.triu(1).mT)
    return matrices


def triangle_size(entries: int) -> int:
    """Return the size c of the matrices whose upper triangles have c (c + 1) / 2 entries.

    Raises:
        ValueError: there is no such size.
    """
    size = (math.isqrt(8 * entries + 1) - 1) // 2
    if size * (size + 1) // 2 != entries:
        raise ValueError(f"{entries} entries are no triangle of a matrix")
    return size
