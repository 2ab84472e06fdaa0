"""Wall time and peak memory of a block of code, on a GPU or of the process."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): sets the peak of the resident set to its present size
_KIB = 1024


class Measurement:
    """Result of :func:`measure`; complete when its block has ended.

    Attributes:
        seconds: wall time.
        peak_bytes: peak memory above the level at the start; None where the system does not report
            it (on a CPU, systems other than Linux).
        memory: what was measured: ``"device"``, ``"rss"``, or None.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None
    memory: str | None = None


@contextmanager
def measure(device: torch.device | str = "cpu") -> Iterator[Measurement]:
    """Measure the time and memory of the block.

    On a GPU: the peak of the memory that torch has allocated on ``device``. On a CPU: the peak of
    the process's resident set, kept by the kernel itself, so no short peak is missed. Memory freed
    before the block is first returned to the system. Memory that the allocator nevertheless keeps
    can hide a part of the block's consumption, but never increases it.
    """
    device = torch.device(device)
    result = Measurement()
    gc.collect()
    before = _start(device)
    start = time.perf_counter()
    try:
        yield result
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.seconds = time.perf_counter() - start
        if before is not None:
            result.memory = "device" if device.type == "cuda" else "rss"
            result.peak_bytes = max(0, _peak(device) - before)


def _start(device: torch.device) -> int | None:
    """Begin a new peak, and return the level in bytes, or None if it cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # a container may forbid it
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * _KIB
    raise RuntimeError(f"{_STATUS} has no {field}")
