"""Blocks of tensors shared out among threads, one for each core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads_over_blocks(
    device: torch.device | str, *, most: int | None = None
) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield an ordered ``map`` that uses every core on the CPU, and one thread elsewhere.

    A thread for each block beats torch's own threads inside of each operation: the operations are
    as small as the cache, and reading overlaps with computing. Meanwhile torch's own are one. An
    error cancels the blocks that have not begun.

    Args:
        device: where the blocks are computed.
        most: how many threads, at most; by default as many as there are cores.
    """
    if torch.device(device).type != "cpu":
        yield map
        return
    inside = torch.get_num_threads()
    count = cores() if most is None else min(cores(), most)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(inside)


def cores() -> int:
    """Return how many logical cores this process may use: reading gains from all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
