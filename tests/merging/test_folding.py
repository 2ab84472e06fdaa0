"""Batch norm folded into the layer before it: the same function in tensors of the same names."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models

from fusion.merging.folding import find_foldings
from fusion.merging.members import Members
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet, find_layers
from fusion.weights import load_tensors


def with_random_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm a weight, a bias and statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias, module.running_mean):
                tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return network.double().eval()


class PlainBias(nn.Module):
    """Convolutions with a bias before their norm, grouped and depthwise, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn3 = nn.BatchNorm2d(8, eps=0.1)
        self.shared = nn.Conv2d(8, 8, 1)
        self.bn4 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = x + self.bn2(self.grouped(x)).relu()
        x = x + self.bn3(self.depthwise(x)).relu()
        y = self.shared(x)  # read by the norm and by the sum: it must not be folded
        return self.head((self.bn4(y) + y).mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS = {
    "bias": (PlainBias, 3),
    "resnet": (lambda: CifarResNet(8, num_classes=4), 3),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(num_classes=4), None),
    "mobilenet": (lambda: models.mobilenet_v3_small(num_classes=4), None),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 8, num_classes=4), None),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_folded_form_computes_the_same(kind: str) -> None:
    build, found = NETWORKS[kind]
    network = with_random_norms(build())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    members = Members.read(BaseModelPool({"_pretrained_": network, "a": network})).folded()
    assert members.foldings
    if kind == "bias":
        assert set(members.foldings) == {"stem", "grouped", "depthwise"}
        assert len(members.foldings) == found
    folded = copy.deepcopy(network)
    load_tensors(folded, members.experts["a"])
    for folding in members.foldings.values():
        norm = folded.get_submodule(folding.norm)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.running_mean.any()
    with torch.no_grad():
        assert_close(folded(images), network(images), rtol=1e-9, atol=1e-9)


def test_scales_that_a_norm_takes_away_are_gone() -> None:
    network = with_random_norms(CifarResNet(8, num_classes=4))
    scaled = copy.deepcopy(network)
    factors = 0.1 + 3 * torch.rand(16, dtype=torch.float64)
    with torch.no_grad():
        scaled.conv1.weight *= factors.view(-1, 1, 1, 1)
        scaled.bn1.running_mean *= factors
        # ε counts beside the variance, so that it is scaled with it.
        scaled.bn1.running_var.add_(scaled.bn1.eps).mul_(factors**2).sub_(scaled.bn1.eps)
    folding = find_foldings(network, find_layers(network))["conv1"]
    one, other = folding.folded(network.state_dict()), folding.folded(scaled.state_dict())
    assert not torch.allclose(network.conv1.weight, scaled.conv1.weight)
    assert one.keys() == other.keys()
    for key in one:
        assert_close(one[key], other[key])


@pytest.mark.parametrize("name", ["stem", "grouped", "depthwise"])
def test_the_norm_of_a_map_keeps_it_and_knows_its_moments(name: str) -> None:
    """Whatever the statistics, the output is W x + b; measured anew on x they do not change."""
    network = with_random_norms(PlainBias())
    folding = find_foldings(network, find_layers(network))[name]
    layer, norm = network.get_submodule(name), network.get_submodule(folding.norm)
    values = torch.randn(6, layer.in_channels, 9, 9, dtype=torch.float64)
    patches = nn.functional.unfold(values, 3, padding=1)
    groups = layer.groups
    patches = patches.view(6, groups, -1, 81).permute(1, 2, 0, 3).flatten(2)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    gram = (patches @ patches.mT / patches.shape[-1])[None]
    bias = torch.randn(8, dtype=torch.float64)
    for grams in (gram, None):
        tensors = folding.of_map(layer.weight.detach(), bias, grams)
        network.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            plain = nn.functional.conv2d(values, layer.weight, padding=1, groups=groups)
            assert_close(norm(layer(values)), plain + bias.view(-1, 1, 1))
        if grams is not None:
            assert_close(norm.running_mean, plain.mean((0, 2, 3)))
            assert_close(norm.running_var, plain.var((0, 2, 3), correction=0))


def test_norms_that_cannot_be_folded_are_left() -> None:
    network = PlainBias()
    network.bn1 = nn.BatchNorm2d(8, affine=False)
    network.bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    assert set(find_foldings(network, find_layers(network))) == {"depthwise"}
    members = Members.read(BaseModelPool({"a": with_random_norms(PlainBias())}))
    assert dataclasses.asdict(members)["foldings"] == {}
