"""One random set of positions for all members of a pool."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def draw_positions(sizes: Mapping[str, int], count: int, *, seed: int) -> dict[str, Tensor]:
    """Draw ``count`` of the entries of some tensors: without replacement, all equally likely.

    The draw depends on the seed, the names and the sizes, not on the order of the names. Memory
    grows with the number of entries drawn (or left out, where that is less).

    Args:
        sizes: name → number of entries.
        count: number of entries to draw in total; all if there are fewer.
        seed: of the draw.

    Returns:
        For each name the ascending flat positions that were drawn in it, int64.
    """
    total = sum(sizes.values())
    left_out = count > total // 2
    drawn = _distinct(total, max(total - count, 0) if left_out else count, seed)
    positions: dict[str, Tensor] = {}
    start = 0
    for name in sorted(sizes):
        low, high = np.searchsorted(drawn, (start, start + sizes[name]))
        inside = drawn[low:high] - start
        if left_out:
            kept = np.ones(sizes[name], dtype=bool)
            kept[inside] = False
            inside = np.flatnonzero(kept)
        positions[name] = torch.from_numpy(inside)
        start += sizes[name]
    return {name: positions[name] for name in sizes}


def _distinct(total: int, count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Draw ``count`` distinct numbers below ``total``, ascending; best for at most half of them."""
    generator = np.random.default_rng(seed)
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < count:
        # Numbers in the order of their first occurrence: every set of them is equally likely.
        drawn = np.concatenate([drawn, generator.integers(total, size=count - len(drawn))])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return np.sort(drawn)
