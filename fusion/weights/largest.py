"""Exact k-th largest of very many numbers, without sorting or storing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 17  # numbers that are processed together: their keys stay in the cache
# Widths of the digits of the bits below the sign, largest first: each has one counter per value.
DIGITS = {torch.float32: (15, 16), torch.float64: (17, 17, 15, 14)}
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest(blocks: Callable[[], Iterable[Tensor]], density: float) -> list[float]:
    """Return the smallest number of each row that a share ``density`` of the row keeps.

    With m numbers in a row it is the k-th largest, k = ceil(density · m), found digit by digit as
    in a radix sort from the top: one walk through the blocks counts how often each value of a digit
    occurs, which determines the digit of the k-th largest. Non-negative IEEE floats are ordered
    as the integers that their bits spell, so the result is exact.

    Args:
        blocks: calling it walks through tensors (n, …) of non-negative numbers, float32 or float64;
            row i of all of them together is row i. It is called twice if all of them are float32,
            once more to find out that they are not and four times then; it must yield the same
            every time.
        density: the share, in (0, 1].

    Returns:
        n numbers; an empty list if there are no blocks.
    """
    found = _search(blocks, density, torch.float32)
    return _search(blocks, density, torch.float64) or [] if found is None else found


def _search(
    blocks: Callable[[], Iterable[Tensor]], density: float, dtype: torch.dtype
) -> list[float] | None:
    """Return the numbers, found as numbers of ``dtype``; ``None`` if one of the blocks is wider."""
    prefixes: list[int] = []
    ranks: list[int] = []
    remaining = sum(DIGITS[dtype])
    for number, digit in enumerate(DIGITS[dtype]):
        remaining -= digit
        counts: Tensor | None = None
        for block in blocks():
            if torch.promote_types(block.dtype, dtype) != dtype:
                return None
            if counts is None:
                counts = torch.zeros(len(block), 1 << digit, dtype=torch.int64)
                prefixes = prefixes or [0] * len(block)
            for row, prefix, count in zip(block.flatten(1), prefixes, counts, strict=True):
                for chunk in row.split(CHUNK):
                    keys = chunk.to(dtype).view(INTEGERS[dtype]) >> remaining
                    if not number:
                        count += torch.bincount(keys, minlength=1 << digit).cpu()
                        continue
                    inside = _matching(keys, keys >> digit, prefix) & ((1 << digit) - 1)
                    # Few are left: adding them one by one beats adding all counters.
                    count.scatter_add_(0, inside, torch.ones_like(inside))
        if counts is None:
            return []
        if not number:
            ranks = [math.ceil(density * int(count.sum())) for count in counts]
        for row_number, count in enumerate(counts):
            at_least = count.flip(0).cumsum(0)
            found = int(torch.searchsorted(at_least, ranks[row_number]))
            ranks[row_number] -= int(at_least[found - 1]) if found else 0
            value = (1 << digit) - 1 - found
            prefixes[row_number] = (prefixes[row_number] << digit) | value
    bits = torch.tensor(prefixes, dtype=torch.int64).to(INTEGERS[dtype])
    return bits.view(dtype).tolist()


def _matching(keys: Tensor, prefixes: Tensor, wanted: int) -> Tensor:
    """Return the keys whose prefix is the wanted one, int64 on the CPU."""
    if keys.device.type == "cpu":  # numpy finds few among many four times as fast
        return keys[torch.from_numpy(np.flatnonzero(prefixes.numpy() == wanted))].long()
    return keys[prefixes == wanted].long().cpu()
