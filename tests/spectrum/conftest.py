from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    """Draw a tensor of unit-variance noise of the given shape; each call draws anew."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def with_signal(noise) -> Callable[..., Tensor]:
    """Draw a×b noise plus ``rank`` orthogonal directions, the weakest 3 times the edge of noise."""

    def draw(a: int, b: int, rank: int) -> Tensor:
        left, right = torch.linalg.qr(noise(a, rank))[0], torch.linalg.qr(noise(b, rank))[0]
        strengths = 3 * (math.sqrt(a) + math.sqrt(b)) * torch.linspace(1, 1.5, rank)
        return noise(a, b) + (left * strengths) @ right.T

    return draw
