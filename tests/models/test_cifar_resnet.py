"""The residual network for CIFAR: its checkpoints, its depths, its two shortcuts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from fusion.alignment import apply_permutation, permutation_spec, random_permutation
from fusion.data import digits
from fusion.errors import UserError
from fusion.models import CifarResNet, find_head
from fusion.models.cifar_resnet import Convolution, Norm, PadShortcut, Shortcut
from fusion.training import fit
from fusion.weights import load_safetensors

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FUSION_TEST_DATA", ROOT.parent / "shared" / "data"))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("depth", [20, 56])
def test_published_weights_load_key_for_key(depth: int) -> None:
    path = DATA / "cifar10-resnet" / f"resnet{depth}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is absent; set FUSION_TEST_DATA to the folder of the shared data")
    weights = load_safetensors(path)
    model = CifarResNet(depth)
    model.load_state_dict(weights, strict=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    assert model.state_dict().keys() == weights.keys() | counters


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # Table 6 of He et al. in thousands: 270, 460, 660, 850, 1700
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)],
)
def test_depths_of_the_paper(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = CifarResNet(depth)
    assert count(model) == parameters
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 33)])
def test_images_of_any_size_give_logits(shortcut: str, channels: int, side: int) -> None:
    model = CifarResNet(8, num_classes=6, in_channels=channels, width=0.5, shortcut=shortcut)
    assert model(torch.randn(2, channels, side, side)).shape == (2, 6)


def test_shortcut_a_pads_with_zeros_on_both_sides() -> None:
    x = torch.rand(2, 16, 5, 5)
    out = PadShortcut(16, 32, 2)(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_shortcut_b_adds_two_convolutions_with_batch_norm() -> None:
    a, b = CifarResNet(8), CifarResNet(8, shortcut="B")
    added = b.state_dict().keys() - a.state_dict().keys()
    assert {key.rpartition(".")[0] for key in added} == {
        f"layer{stage}.0.shortcut.{part}" for stage in (2, 3) for part in (0, 1)
    }


def test_width_scales_every_stage() -> None:
    model = CifarResNet(8, width=2)
    assert model.conv1.out_channels == 32
    assert model.linear.in_features == 128


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_its_graph_computes_what_it_computes(shortcut: str) -> None:
    model = CifarResNet(8, width=0.5, shortcut=shortcut).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fx.symbolic_trace(model)(images), model(images))


@pytest.mark.parametrize("depth", [2, 7, 18, 51])
def test_a_depth_that_is_not_6n_plus_2(depth: int) -> None:
    with pytest.raises(UserError, match=rf"6n\+2.*not {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize(
    "options", [{"shortcut": "C"}, {"num_classes": 0}, {"in_channels": 0}, {"width": 0}]
)
def test_options_outside_their_range(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        CifarResNet(**options)


VARIANTS = [("batch", conv) for conv in ("full", "grouped", "depthwise")]
VARIANTS += [(norm, "full") for norm in ("group", "layer", "none")]
VARIANTS += [("group", "grouped"), ("none", "depthwise")]


@pytest.mark.parametrize(("norm", "conv"), VARIANTS)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_variants_are_traced_to_their_head_and_permuted(
    norm: Norm, conv: Convolution, shortcut: Shortcut
) -> None:
    torch.manual_seed(0)
    model = CifarResNet(14, 6, 1, 0.5, shortcut, norm, conv).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # no zeros, no equal scales
    images = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    logits = model(images)
    assert logits.shape == (4, 6)
    assert find_head(model).tensors == ("linear.weight", "linear.bias")
    norms = {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)}
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm}
    assert norms == ({kinds[norm]} if norm in kinds else set())

    spec = permutation_spec(model, images)
    head = model.linear.bias.numel()
    assert (1 - spec.coverage) * count(model) <= head + 0.5
    permutation = random_permutation(spec, 1)
    assert any(not torch.equal(p, torch.arange(len(p))) for p in permutation.values())
    permuted = apply_permutation(model, spec, permutation)
    torch.testing.assert_close(permuted(images), logits, rtol=1e-10, atol=1e-10)


def test_the_published_network_is_the_default() -> None:
    torch.manual_seed(0)
    default = CifarResNet(8).state_dict()
    torch.manual_seed(0)
    named = CifarResNet(8, norm="batch", conv="full").state_dict()
    assert all(torch.equal(named[key], value) for key, value in default.items())
    assert not [key for key in default if key.endswith("conv1.bias")]


def test_without_norms_a_deep_network_starts_with_moderate_logits() -> None:
    torch.manual_seed(0)
    model = CifarResNet(56, norm="none")
    logits = model(torch.randn(16, 3, 32, 32))
    assert 0.1 < logits.std().item() < 10


@pytest.mark.parametrize(("norm", "conv"), VARIANTS)
def test_variants_learn_digits(norm: Norm, conv: Convolution) -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1, norm=norm, conv=conv)
    history = fit(model, digits(), epochs=3, lr=0.01, batch_size=64)
    assert history.epochs[-1].train.accuracy > 0.8


@pytest.mark.parametrize("options", [{"norm": "group"}, {"conv": "grouped"}])
def test_four_groups_divide_the_channels(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"4 groups of channels, and a stage has 10"):
        CifarResNet(8, width=0.625, **options)  # type: ignore[arg-type]
