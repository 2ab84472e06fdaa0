"""The separable network: its size, its shapes, its graph."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fusion.errors import UserError
from fusion.models import SeparableResNet


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        assert count(SeparableResNet()) == 944_494
        # a smaller head, and one channel less at the stem, where a depthwise kernel (9 + 1 bias),
        # its batch norm (2) and a row of the pointwise weight (64) belong to each input channel
        assert count(SeparableResNet(num_classes=4)) == 944_494 - 6 * 65
        assert count(SeparableResNet(in_channels=1)) == 944_494 - 2 * 76


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 33), (1, 4)])
def test_images_of_any_size_give_logits(channels: int, side: int) -> None:
    model = SeparableResNet(num_classes=6, in_channels=channels, width=0.25)
    assert model(torch.randn(3, channels, side, side)).shape == (3, 6)


def test_width_scales_the_trunk_and_the_classifier() -> None:
    model = SeparableResNet(width=0.5)
    assert model.head.in_features == 32
    assert max(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) == 128
    assert max(m.out_features for m in model.modules() if isinstance(m, nn.Linear)) == 256


def test_every_convolution_is_followed_by_its_own_batch_norm() -> None:
    modules = list(SeparableResNet(width=0.25).modules())
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert [m.num_features for m in norms] == [m.out_channels for m in convolutions]


def test_a_block_starts_as_the_identity_and_adds_its_branch() -> None:
    block = SeparableResNet(width=0.25).stage1[0].eval()
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    nn.init.ones_(block.second.pointwise_norm.weight)
    branch = block.second(torch.relu(block.first(x)))
    assert branch.abs().max() > 0
    torch.testing.assert_close(block(x), torch.relu(x + branch))


def test_dropout_follows_the_first_three_fully_connected_layers() -> None:
    classifier = SeparableResNet(dropout=0.25).classifier
    rates = [m.p for m in classifier if isinstance(m, nn.Dropout)]
    assert rates == [0.25, 0.25, 0.25]
    assert isinstance(classifier[-1], nn.ReLU)


def test_its_graph_computes_what_it_computes() -> None:
    model = SeparableResNet(width=0.25).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # zero at the end of each branch, it would hide a fault
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fx.symbolic_trace(model)(images), model(images))


@pytest.mark.parametrize(
    "options", [{"num_classes": 0}, {"in_channels": 0}, {"width": 0.0}, {"dropout": 1.0}]
)
def test_options_outside_their_range(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        SeparableResNet(**options)
