"""Layers: each key in one of them, in the order in which they run, with the norms that follow."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fusion.errors import UserError
from fusion.models import CifarResNet, Layer, SeparableResNet, find_layers

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

TORCHVISION = [
    "resnet18",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "shufflenet_v2_x1_0",
    "googlenet",
    "vgg11_bn",
    "squeezenet1_1",
]


def build(name: str, device: str = "meta") -> nn.Module:
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device(device):
        return torchvision.models.get_model(name, **options)


def by_name(layers: tuple[Layer, ...]) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers}


def owner(layers: tuple[Layer, ...], key: str) -> str:
    (name,) = [layer.name for layer in layers if key in layer.tensors]
    return name


def assert_partition(model: nn.Module, layers: tuple[Layer, ...]) -> None:
    counts = Counter(key for layer in layers for key in layer.tensors)
    assert set(counts) == set(model.state_dict())
    assert set(counts.values()) <= {1}
    assert all(layer.weight in layer.tensors for layer in layers)
    assert len({layer.name for layer in layers}) == len(layers)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_are_partitioned_into_their_convolutions_and_linear_maps(
    name: str,
) -> None:
    model = build(name)
    layers = find_layers(model)
    assert_partition(model, layers)
    modules = dict(model.named_modules())
    weighted = {n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    norms = {n for n, m in modules.items() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)}
    assert {layer.name for layer in layers} == weighted
    assert sorted(norm for layer in layers for norm in layer.norms) == sorted(norms)
    for layer in layers:
        assert layer.weight == f"{layer.name}.weight"
        assert layer.kind == ("linear" if isinstance(modules[layer.name], nn.Linear) else "conv")
        assert layer.groups == getattr(modules[layer.name], "groups", 1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "mobilenet_v3_small"])
def test_the_norm_of_a_plain_block_is_the_one_with_its_channels(name: str) -> None:
    model = build(name)
    modules = dict(model.named_modules())
    for layer in find_layers(model):
        for norm in layer.norms:
            assert modules[norm].num_features == modules[layer.name].out_channels


def order_of_calls(model: nn.Module, images: Tensor) -> list[str]:
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize(
    "model",
    [
        build("resnet18", "cpu"),
        build("shufflenet_v2_x1_0", "cpu"),
        build("googlenet", "cpu"),
        CifarResNet(20, shortcut="B"),
        SeparableResNet(width=0.25),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_order_is_that_of_the_calls(model: nn.Module) -> None:
    called = order_of_calls(model, IMAGES)
    assert len(called) > 20
    layers = find_layers(model)
    assert [layer.name for layer in layers if layer.reached] == called


def test_our_networks() -> None:
    for model in (CifarResNet(20), CifarResNet(20, shortcut="B"), SeparableResNet()):
        layers = find_layers(model)
        assert_partition(model, layers)
        assert all(len(layer.norms) == 1 for layer in layers[:-1])
        assert layers[-1].norms == ()
    assert len(find_layers(CifarResNet(20))) == 20
    separable = by_name(find_layers(SeparableResNet()))
    depthwise = separable["stage2.0.first.depthwise"]
    assert depthwise == Layer(
        name="stage2.0.first.depthwise",
        weight="stage2.0.first.depthwise.weight",
        tensors=tuple(
            f"stage2.0.first.{key}"
            for key in (
                "depthwise.weight",
                "depthwise.bias",
                "depthwise_norm.weight",
                "depthwise_norm.bias",
                "depthwise_norm.running_mean",
                "depthwise_norm.running_var",
                "depthwise_norm.num_batches_tracked",
            )
        ),
        groups=128,
        kind="conv",
        norms=("stage2.0.first.depthwise_norm",),
    )


def test_a_norm_after_a_concatenation_belongs_to_its_last_part() -> None:
    layers = by_name(find_layers(build("densenet121")))
    block = "features.denseblock1.denselayer"
    assert layers["features.conv0"].norms == ("features.norm0", f"{block}1.norm1")
    assert layers[f"{block}1.conv2"].norms == (f"{block}2.norm1",)
    assert layers["features.denseblock4.denselayer16.conv2"].norms == ("features.norm5",)


def test_layer_scale_belongs_to_the_branch_that_it_scales() -> None:
    layers = find_layers(build("convnext_tiny"))
    assert owner(layers, "features.1.0.layer_scale") == "features.1.0.block.5"
    assert owner(layers, "classifier.0.weight") == "features.7.2.block.5"


def test_auxiliary_heads_come_last_in_order_of_registration() -> None:
    layers = find_layers(build("googlenet"))
    unreached = [layer for layer in layers if not layer.reached]
    assert layers[-len(unreached) :] == tuple(unreached)
    assert [layer.name for layer in unreached] == [
        f"aux{aux}.{part}" for aux in (1, 2) for part in ("conv.conv", "fc1", "fc2")
    ]
    assert unreached[0].norms == ("aux1.conv.bn",)


def test_the_model_is_left_as_it_was() -> None:
    model = CifarResNet(8).train()
    before = copy.deepcopy(model.state_dict())
    find_layers(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class PreActivation(nn.Module):
    """Norm first, on the input itself, then convolutions around a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)  # registered first, run last
        self.norm0 = nn.BatchNorm2d(3)
        self.skip = nn.Conv2d(3, 8, 1)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.norm2 = nn.InstanceNorm2d(8)  # owns no tensor

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        x = self.norm0(x)
        if flip:
            x = x.flip(-1)
        y = self.scale * self.conv1(x) + self.skip(x)
        y = self.norm2(torch.relu(self.norm1(y)))
        return self.head(y.mean((2, 3)))


def test_a_norm_on_the_input_belongs_to_the_first_layer_that_reads_it() -> None:
    model = PreActivation()
    layers = find_layers(model)
    assert_partition(model, layers)
    assert [layer.name for layer in layers] == ["conv1", "skip", "head"]
    assert layers[0].norms == ("norm0",)
    assert layers[1].norms == ("norm1", "norm2")
    assert owner(layers, "scale") == "conv1"


class Tied(nn.Module):
    """An encoder and a decoder with one weight, and one convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.conv
        self.norm = nn.BatchNorm2d(3)
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.again(self.conv(x))).mean((2, 3))
        return self.head(self.decode(torch.relu(self.encode(x))))


def test_what_is_tied_counts_once() -> None:
    model = Tied()
    layers = find_layers(model)
    assert_partition(model, layers)
    assert [layer.name for layer in layers] == ["conv", "encode", "head"]
    assert set(layers[0].tensors) >= {"conv.weight", "again.weight", "conv.bias", "again.bias"}
    assert layers[0].norms == ("norm",)
    assert set(layers[1].tensors) == {
        f"{module}.{part}" for module in ("encode", "decode") for part in ("weight", "bias")
    }


class Functional(nn.Module):
    """Convolutions of plain parameters, a weight read from a module, and a norm of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 3, 3, 3))
        self.shift = nn.Parameter(torch.zeros(4))
        self.depthwise = nn.Parameter(torch.zeros(4, 1, 3, 3))
        self.frozen = torchvision.ops.FrozenBatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.fc = nn.Linear(4, 2)
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel) + self.shift[:, None, None]
        x = F.conv2d(x, self.depthwise, groups=4)
        x = self.up(self.frozen(x))
        return F.linear(x.mean((2, 3)), F.normalize(self.fc.weight), self.fc.bias)


def test_functional_convolutions_are_layers() -> None:
    model = Functional()
    layers = find_layers(model)
    assert_partition(model, layers)
    assert [(layer.name, layer.kind, layer.groups) for layer in layers] == [
        ("kernel", "conv", 1),
        ("depthwise", "conv", 4),
        ("up", "conv_transpose", 1),
        ("fc", "linear", 1),
    ]
    assert owner(layers, "shift") == "kernel"
    assert layers[1].norms == ("frozen",)


def test_a_parametrized_weight_belongs_to_its_module() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    first, last = find_layers(model)
    assert_partition(model, (first, last))
    assert first.weight == "0.parametrizations.weight.original1"
    assert first.norms == ("1",)


def test_attention_is_reduced_to_its_linear_map() -> None:
    model = torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
    layers = find_layers(model)
    assert_partition(model, layers)
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert owner(layers, f"{attention}.in_proj_weight") == f"{attention}.out_proj"


class DataDependent(nn.Module):
    """Looks at the values that it computes, so that no symbolic tracer can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.input_norm = nn.BatchNorm2d(3)
        self.gain = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(3, 8, 3)
        self.norm2 = nn.BatchNorm2d(8)
        self.norm1 = nn.BatchNorm2d(8)
        self.last_norm = nn.BatchNorm2d(8)
        self.unused = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(x)
        first, second = self.conv1(x), self.conv2(x)
        x = self.norm1(first) + self.norm2(second)
        if x.sum() > 1e9:
            x = self.unused(x)
        return self.head(self.last_norm(torch.relu(x)).mean((2, 3)) * self.gain)


def test_a_network_that_cannot_be_traced_is_run() -> None:
    model = DataDependent().train()
    before = copy.deepcopy(model.state_dict())
    layers = find_layers(model, IMAGES)
    assert_partition(model, layers)
    assert [layer.name for layer in layers] == ["conv1", "conv2", "head", "unused"]
    assert [layer.reached for layer in layers] == [True, True, True, False]
    assert layers[0].norms == ("input_norm", "norm1")
    assert layers[1].norms == ("norm2", "last_norm")
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model", [CifarResNet(8), SeparableResNet(width=0.25), PreActivation()])
def test_running_finds_the_layers_that_tracing_finds(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = find_layers(model)
    monkeypatch.setattr("fusion.models.forward_pass.trace", lambda ledger: "switched off")
    executed = find_layers(model, IMAGES)
    assert [layer.name for layer in executed] == [layer.name for layer in traced]
    if not isinstance(model, PreActivation):  # there a sum stands between layer and norm
        assert executed == traced


def test_without_an_input_the_error_says_where_tracing_stopped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(DataDependent()))
    with pytest.raises(UserError, match=r"module '1\.0' \(test_layers\.py:\d+\).*example_input="):
        find_layers(model)


def test_a_network_without_weights_has_no_layers() -> None:
    with pytest.raises(UserError, match="no convolution or linear layer"):
        find_layers(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))


def test_a_single_module_is_a_network() -> None:
    (layer,) = find_layers(nn.Conv2d(4, 4, 3, groups=2))
    assert layer == Layer("", "weight", ("weight", "bias"), 2, "conv", ())
