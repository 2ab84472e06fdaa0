"""Freed memory is used again: the pages of the next tensor are not faulted in anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from fusion.cli.freed_memory import keep_freed_memory
kept = {call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):  # as the tensors of a forward pass; each page is written
        [bytearray(16 * 2**20) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""
PAGES = 10 * 6 * 16 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def run(call: str, **environment: str) -> tuple[bool, int]:
    """Return what the call returned, and the page faults of ten buffers after it."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return found[0] == "True", int(found[1])


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)


def test_freed_memory_is_used_again() -> None:
    kept, faults = run("keep_freed_memory()")
    if not kept:
        pytest.skip("not the GNU C library")
    assert faults < PAGES / 10
    _, plain = run("False")
    # Huge pages count one fault for many pages.
    assert plain > 10 * max(faults, 1) or plain > PAGES / 2


def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = run("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1048576")
    assert not kept
