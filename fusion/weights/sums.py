"""Sums over long rows that come in parts: the same whichever parts these are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 10  # entries that are summed by one call: what rows are cut into from their beginning


class RowSums:
    """Sums of the rows of many tensors, in float64.

    Floating-point addition depends on its order. So that parts of a tensor have the very sum of the
    whole tensor, every row is cut into chunks of ``CHUNK`` entries, and the sums of these are added
    up one after another. Parts are given in order, and all but the last of a tensor have a multiple
    of ``CHUNK`` entries.

    Example::

        >>> tensor, whole, parts = torch.rand(2, 5000), RowSums(), RowSums()
        >>> whole.add(tensor)
        >>> for part in tensor.split(2048, dim=1):
        ...     parts.add(part)
        >>> whole.values == parts.values
        True
    """

    def __init__(self) -> None:
        self._totals: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None

    def add(self, rows: Tensor) -> None:
        """Add a tensor (n, …), or the next part of one, to the sums of its n rows."""
        rows = rows.reshape(len(rows), -1)
        whole = rows.shape[1] // CHUNK * CHUNK
        sums = rows[:, :whole].reshape(len(rows), -1, CHUNK).sum(2, dtype=torch.float64)
        if whole < rows.shape[1]:
            rest = rows[:, whole:].sum(1, keepdim=True, dtype=torch.float64)
            sums = torch.cat([sums, rest], dim=1)
        if self._totals is None:
            self._totals = np.zeros(len(rows))
        # Unlike a sum, which numpy and torch pair up, these partial sums have one order.
        row = np.concatenate([self._totals[:, None], sums.cpu().numpy()], axis=1)
        self._totals = np.add.accumulate(row, axis=1)[:, -1].copy()

    @property
    def values(self) -> list[float]:
        """The n sums so far; an empty list before the first tensor."""
        return [] if self._totals is None else self._totals.tolist()
