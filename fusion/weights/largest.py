"""The k-th largest of very many numbers, exact, without ever sorting or keeping them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

CHUNK = 1 << 18  # numbers that are widened to int64 keys at a time
# Widths of the digits of a float64's 63 bits below the sign, largest first. A float32 ends in 29
# zero bits, so that the first two digits tell everything about it.
DIGITS = (17, 17, 15, 14)
DIGITS_OF_FLOAT32 = 2


def kth_largest(blocks: Callable[[], Iterable[Tensor]], density: float) -> list[float]:
    """Return the smallest number of each row that a share ``density`` of the row keeps.

    With m numbers in a row it is the k-th largest, k = ceil(density · m), found digit by digit as
    in a radix sort from the top: one walk through the blocks counts how often each value of a digit
    occurs, which says what the digit of the k-th largest is. Non-negative IEEE floats are ordered
    as the integers that their bits spell, so the result is exact.

    Args:
        blocks: calling it walks through tensors (n, …) of non-negative numbers, float32 or float64;
            row i of all of them together is row i. It is called twice if all of them are float32,
            four times otherwise, and must yield the same every time.
        density: the share, in (0, 1].

    Returns:
        n numbers; an empty list if there are no blocks.
    """
    prefixes: list[int] = []
    ranks: list[int] = []
    remaining = sum(DIGITS)
    wide = False
    for number, digit in enumerate(DIGITS):
        if number == DIGITS_OF_FLOAT32 and not wide:
            break
        remaining -= digit
        counts: Tensor | None = None
        for block in blocks():
            if counts is None:
                counts = torch.zeros(len(block), 1 << digit, dtype=torch.int64)
                prefixes = prefixes or [0] * len(block)
            wide = wide or block.dtype == torch.float64
            for row, prefix, count in zip(block.flatten(1), prefixes, counts, strict=True):
                for chunk in row.split(CHUNK):
                    keys = chunk.double().view(torch.int64) >> remaining
                    if number:
                        keys = keys[keys >> digit == prefix]
                    inside = torch.bitwise_and(keys, (1 << digit) - 1)
                    count += torch.bincount(inside, minlength=1 << digit).cpu()
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
    bits = torch.tensor(prefixes, dtype=torch.int64) << remaining
    return bits.view(torch.float64).tolist()
