"""Moments behind a merged prefix, and the stages in which layers are merged one after another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fusion.data import ImageTensors
from fusion.errors import UserError
from fusion.merging.statistics import collect, prefix_moments, stages
from fusion.models import CifarResNet, Layer, find_layers


class Mixed(nn.Module):
    """Every kind of layer: grouped, transposed, strided, tied; activations that work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.beside = nn.Conv2d(8, 6, 1, stride=2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(4, 5)
        self.plain = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = F.relu(self.grouped(x), inplace=True) + x
        x = F.relu(self.down(x), inplace=True) + F.relu(self.beside(x), inplace=True)
        x = self.up(x, output_size=(8, 8)).relu_().flatten(2).mT
        x = self.twice(F.relu(self.twice(x), inplace=True)).mean(1)
        return self.head(F.linear(x, self.plain))


def make(seed: int, kind: type[nn.Module] = Mixed, *args: object, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*args, **options).eval()


def residual(seed: int, classes: int = 10) -> nn.Module:
    """A residual network with convolutions in its shortcuts."""
    return make(seed, CifarResNet, 8, classes, in_channels=1, width=0.5, shortcut="B")


@pytest.fixture
def images(train_digits: ImageTensors) -> Tensor:
    return train_digits.normalise(train_digits.images[:24])


def weight_of(network: nn.Module, layer: Layer) -> Tensor:
    """W̃ of each group, (g, out/g, d + 1)."""
    module = network.get_submodule(layer.name)
    weight = module.weight.detach().double()
    if layer.kind == "conv_transpose":
        weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)])
    rows = weight.flatten(1).view(layer.groups, -1, weight[0].numel())
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()
    return torch.cat([rows, bias.double().view(*rows.shape[:2], 1)], -1)


@pytest.mark.parametrize("build", [make, residual], ids=["mixed", "residual"])
def test_in_the_expert_itself_its_weight_is_the_solution(build, images) -> None:
    """W̃ xx = yx, and yy is the diagonal of W̃ xx W̃ᵀ."""
    expert = build(0)
    layers = find_layers(expert)
    seen = 0
    for stage in stages(expert, layers):
        found = prefix_moments(copy.deepcopy(expert), expert, stage, images.split(10))
        seen += len(found)
        for layer in stage:
            if layer.weight not in found:
                assert layer.weight in ("plain", "unused.weight")
                continue
            moments, weight = found[layer.weight], weight_of(expert, layer)
            scale = float(moments.yy.max())
            assert_close(weight @ moments.xx, moments.yx, rtol=1e-4, atol=1e-4 * scale**0.5)
            squares = (weight @ moments.xx * weight).sum(-1)
            assert_close(moments.yy, squares, rtol=1e-4, atol=1e-5 * scale)
    assert seen == len(layers) - (2 if build is make else 0)


def watch(network: nn.Module, name: str, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The inputs and outputs of all calls of a module."""
    calls: list[tuple[Tensor, Tensor]] = []
    module = network.get_submodule(name)
    handle = module.register_forward_hook(
        lambda _, args, output: calls.append((args[0].double(), output.double().clone()))
    )
    with torch.no_grad():
        network(images)
    handle.remove()
    return calls


def test_inputs_come_from_the_merged_network_and_answers_from_the_expert(images) -> None:
    merged, expert = make(0), make(1)
    layers = {layer.name: layer for layer in find_layers(merged)}
    everything = [(images, torch.zeros(len(images)))]
    grams = collect(merged, everything, {"gram"}, layers=list(layers.values()))
    for name in ("grouped", "down", "up", "head", "twice"):
        layer = layers[name]
        found = prefix_moments(merged, expert, [layer], images.split(7))[layer.weight]
        assert_close(found.xx, grams[layer.weight]["gram"], rtol=1e-4, atol=1e-6)
        calls = watch(expert, name, images)
        units = torch.cat(
            [y.movedim(-1 if layer.kind == "linear" else 1, 0).flatten(1) for _, y in calls], 1
        )
        assert found.positions == units.shape[1]
        assert_close(found.yy.flatten(), units.square().mean(1), rtol=1e-4, atol=1e-7)
        assert_close(found.yx[..., -1].flatten(), units.mean(1), rtol=1e-4, atol=1e-6)
    inputs = torch.cat([x for x, _ in watch(merged, "twice", images)])
    answers = torch.cat([y for _, y in watch(expert, "twice", images)])
    found = prefix_moments(merged, expert, [layers["twice"]], [images])["twice.weight"]
    expected = answers.flatten(0, 1).T @ inputs.flatten(0, 1) / found.positions
    assert_close(found.yx[0, :, :-1], expected, rtol=1e-4, atol=1e-6)


def test_least_squares_layer_after_layer_gives_the_expert_back(images) -> None:
    """From a merged network that is wrong everywhere: each layer solved behind its prefix.

    Inputs of full rank are given to every layer, so the solution is unique.
    """
    expert = make(0, Chain)
    merged = make(1, Chain)
    noise = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for stage in stages(merged, find_layers(merged)):
        for key, moments in prefix_moments(merged, expert, stage, noise.split(200)).items():
            solved = torch.linalg.solve(moments.xx, moments.yx, left=False)
            module = merged.get_submodule(key.removesuffix(".weight"))
            with torch.no_grad():
                module.weight.copy_(solved[..., :-1].reshape(module.weight.shape))
                module.bias.copy_(solved[..., -1].flatten())
    for key, tensor in expert.state_dict().items():
        assert_close(merged.state_dict()[key], tensor, rtol=1e-2, atol=1e-3)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 4, 3, groups=2)
        self.side = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.3)
        x = F.leaky_relu(self.second(x) + self.side(x)[..., 1:-1, 1:-1], 0.3)
        return self.head(x.mean((2, 3)))


def test_heads_may_differ_in_size(images) -> None:
    merged, expert = residual(0), residual(1, classes=3)
    head = find_layers(merged)[-1]
    assert prefix_moments(merged, expert, [head], [images])[head.weight].yx.shape == (1, 3, 33)


@torch.no_grad()
@pytest.mark.parametrize("build", [make, residual], ids=["mixed", "residual"])
def test_layers_of_a_stage_do_not_depend_on_each_other(build, images) -> None:
    """Another weight changes what no other layer of the stage or before it receives."""
    network = build(0)
    layers = [
        layer for layer in find_layers(network) if layer.weight not in ("plain", "unused.weight")
    ]
    found = stages(network, find_layers(network))
    assert sorted(layer.weight for stage in found for layer in stage) == sorted(
        layer.weight for layer in find_layers(network)
    )
    assert any(len(stage) > 1 for stage in found)
    received = {layer.name: watch(network, layer.name, images)[0][0] for layer in layers}
    place = {layer.name: number for number, stage in enumerate(found) for layer in stage}
    for layer in layers:
        other = copy.deepcopy(network)
        other.get_submodule(layer.name).weight.mul_(1.5)
        for name, before in received.items():
            after = watch(other, name, images)[0][0]
            if place[name] <= place[layer.name]:
                assert torch.equal(before, after), (layer.name, name)


def test_stages_of_a_residual_network() -> None:
    network = residual(0)
    names = [[layer.name for layer in stage] for stage in stages(network, find_layers(network))]
    assert ["layer2.0.conv1", "layer2.0.shortcut.0"] in names
    assert sum(map(len, names)) == len(find_layers(network))
    assert len(names) == 8


class Untraceable(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_without_a_graph_every_layer_is_a_stage(images) -> None:
    network = make(0, Untraceable)
    layers = find_layers(network, images[:1])
    assert [len(stage) for stage in stages(network, layers)] == [1] * len(layers)


def test_a_pass_ends_behind_its_stage(images) -> None:
    network = residual(0)
    ran: list[int] = []
    layer = next(layer for layer in find_layers(network) if layer.name == "layer2.0.conv1")
    network.layer3.register_forward_hook(lambda _, args, __: ran.append(len(args[0])))
    prefix_moments(network, copy.deepcopy(network), [layer], images.split(8))
    assert max(ran) == 1  # a single image, to count the calls
    with pytest.raises(UserError, match="at least one image"):
        prefix_moments(network, network, [layer], [])
