"""Tensors and a small real network for the tests of the kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class SkipNet(nn.Module):
    """Batch norm, a skip connection and a tied pair of convolutions in a few weights."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.again.weight = self.conv.weight
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.norm(self.conv(x)))
        return self.head(self.again(x).mean((2, 3)))


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SkipNet()


@pytest.fixture
def make():
    """Return a maker of normal tensors, seeded by a number."""

    def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape or (6, 4, 3, 3), generator=generator, dtype=dtype)

    return normal
