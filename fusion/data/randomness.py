"""Temporarily seed the global random generators of torch, Python and NumPy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_NUMPY_SEEDS = 2**32  # NumPy's global generator takes seeds below this


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Restore the three generators (of torch, the CPU's) when the block ends."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def seed_global_generators(seed: int) -> None:
    """Seed the three generators; transforms of images draw from any of them."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)  # noqa: NPY002
