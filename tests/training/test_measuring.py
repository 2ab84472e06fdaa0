from __future__ import annotations

import sys

import numpy as np
import pytest

from fusion.training import measure

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_a_short_peak_counts_and_what_was_there_before_does_not() -> None:
    standing = np.ones(64 * MIB, dtype=np.uint8)
    with measure() as found:
        np.ones(200 * MIB, dtype=np.uint8)  # gone at once; a sampling thread would miss it
    assert found.memory == "rss"
    assert found.peak_bytes is not None
    assert 195 * MIB < found.peak_bytes < 230 * MIB
    assert standing.all()


@linux
def test_an_earlier_peak_does_not_count() -> None:
    np.ones(300 * MIB, dtype=np.uint8)
    with measure() as found:
        np.ones(20 * MIB, dtype=np.uint8)
    assert found.peak_bytes is not None
    assert found.peak_bytes < 60 * MIB


def test_work_that_fails_is_measured_too() -> None:
    with pytest.raises(RuntimeError), measure() as found:
        raise RuntimeError
    assert found.seconds > 0
