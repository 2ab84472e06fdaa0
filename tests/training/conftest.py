from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusion.data import ImageTensors, digits
from fusion.models import CifarResNet


@pytest.fixture(scope="session")
def train_digits() -> ImageTensors:
    return digits("train")


@pytest.fixture(scope="session")
def test_digits() -> ImageTensors:
    return digits("test")


class WithDropout(nn.Module):
    """A residual network with batch norm, skip connections and dropout before its head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = CifarResNet(8, num_classes=16, in_channels=1)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.body(x)))


@pytest.fixture
def make_model() -> Callable[..., WithDropout]:
    """The same network at every call, without a trace in the global generator."""

    def make(num_classes: int = 10) -> WithDropout:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return WithDropout(num_classes)

    return make
