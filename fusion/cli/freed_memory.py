"""Keep the memory that tensors free for the next tensors, instead of giving it back at once."""

from __future__ import annotations

import ctypes
import os
import sys

# Names and numbers of <malloc.h> of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what a 64-bit GNU C library accepts
_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Let the allocator keep up to 1 GiB of freed memory, and return whether it does.

    The GNU C library returns the memory of a large tensor to the system as soon as it is freed, and
    the system clears every page of the next one: for small networks on a CPU as much work as the
    convolutions (``scripts/benchmark_freed_memory.py``). Other C libraries are left alone, and so
    are settings of the user's (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``).
    """
    users = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
    if users or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _KEPT)
    )
