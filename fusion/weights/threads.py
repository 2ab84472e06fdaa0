"""Distribute blocks of tensors among threads, one per core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def threads_over_blocks(
    device: torch.device | str, *, most: int | None = None
) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield an ordered ``map`` that uses every core on the CPU, and one thread elsewhere.

    One thread per block is faster than torch's threads within each operation, because each block
    fits into the cache, reading overlaps with computing, and LAPACK gains little from threads.
    Meanwhile torch and the BLAS of scipy use a single thread. Blocks are requested as they are
    needed, two for each thread. An error cancels the blocks that have not started.

    Args:
        device: where the blocks are computed.
        most: maximum number of threads; by default the number of cores.
    """
    if torch.device(device).type != "cpu":
        yield map
        return
    inside = torch.get_num_threads()
    count = cores() if most is None else min(cores(), most)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield partial(_map, pool, 2 * count)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(inside)


def _map(
    pool: ThreadPoolExecutor, ahead: int, function: Callable[[Any], Any], blocks: Iterable[Any]
) -> Iterator[Any]:
    """Yield the results of ``function`` in order, with ``ahead`` blocks requested at a time."""
    waiting: deque[Future[Any]] = deque()
    for block in blocks:
        waiting.append(pool.submit(function, block))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def cores() -> int:
    """Return the number of logical cores of this process: reading gains from all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
