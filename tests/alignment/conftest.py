"""One small member of each torchvision family, with every number randomised."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext, densenet, efficientnet, regnet, resnet, vgg

from fusion.alignment import PermutationSpec, permutation_spec


def narrow_vgg(batch_norm: bool) -> nn.Module:
    net = vgg.VGG.__new__(vgg.VGG)  # its constructor always makes a classifier of 120 million
    nn.Module.__init__(net)
    net.features = vgg.make_layers([8, "M", 12, 16, "M"], batch_norm=batch_norm)
    net.avgpool = nn.AdaptiveAvgPool2d((3, 3))
    net.classifier = nn.Sequential(
        nn.Linear(16 * 9, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 20), nn.ReLU(True),
        nn.Dropout(), nn.Linear(20, 10),
    )  # fmt: skip
    return net


def shallow_resnet(groups: int, width: int) -> nn.Module:
    return resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], groups=groups, width_per_group=width, num_classes=10
    )


def shallow_convnext() -> nn.Module:
    setting = [
        convnext.CNBlockConfig(16, 24, 1),
        convnext.CNBlockConfig(24, 32, 2),
        convnext.CNBlockConfig(32, None, 1),
    ]
    return convnext.ConvNeXt(setting, stochastic_depth_prob=0.1, num_classes=10)


def shallow_efficientnet_v2() -> nn.Module:
    setting = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 16, 16, 2),
        efficientnet.FusedMBConvConfig(4, 3, 2, 16, 24, 2),
        efficientnet.MBConvConfig(4, 3, 2, 24, 40, 2),
    ]
    return efficientnet.EfficientNet(setting, dropout=0.2, last_channel=80, num_classes=10)


def shallow_regnet(se_ratio: float | None) -> nn.Module:
    params = regnet.BlockParams.from_init_params(
        depth=7, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=se_ratio
    )
    return regnet.RegNet(params, num_classes=10, stem_width=16)


# name -> (constructor, side of the square input)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (lambda: models.alexnet(num_classes=10), 63),
    "vgg": (lambda: narrow_vgg(batch_norm=False), 24),
    "vgg_bn": (lambda: narrow_vgg(batch_norm=True), 24),
    "resnet18": (lambda: models.resnet18(num_classes=10), 32),
    "resnext": (lambda: shallow_resnet(groups=8, width=8), 32),
    "wide_resnet": (lambda: shallow_resnet(groups=1, width=128), 32),
    "densenet": (
        lambda: densenet.DenseNet(12, (2, 3, 2), 16, num_classes=10),
        32,
    ),
    "googlenet": (
        lambda: models.googlenet(init_weights=False, aux_logits=False, num_classes=10),
        32,
    ),
    "inception_v3": (
        lambda: models.inception_v3(init_weights=False, aux_logits=False, num_classes=10),
        75,
    ),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=10), 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(width_mult=0.5, num_classes=10), 32),
    "mobilenet_v3": (lambda: models.mobilenet_v3_small(num_classes=10), 32),
    "mnasnet": (lambda: models.mnasnet0_5(num_classes=10), 32),
    "shufflenet_v2": (lambda: models.shufflenet_v2_x0_5(num_classes=10), 32),
    "efficientnet": (lambda: models.efficientnet_b0(num_classes=10), 32),
    "efficientnet_v2": (shallow_efficientnet_v2, 32),
    "regnet_x": (lambda: shallow_regnet(se_ratio=None), 32),
    "regnet_y": (lambda: shallow_regnet(se_ratio=0.25), 32),
    "convnext": (shallow_convnext, 32),
}


def randomise(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Give every norm, bias and per-channel scale numbers that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * drawn).to(like)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(uniform(p, 0.0, 1.0))  # positive: few units are dead after a ReLU
            elif p.ndim <= 1 or name.endswith("layer_scale"):
                p.copy_(uniform(p, 0.5, 1.5))
    model.eval()

    def off_by_half(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        # What arrives has passed the layers before as they are now: nothing grows on the way.
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        var = var.clamp(min=float(var.mean()))  # of two values it can be next to nothing
        norm.running_mean = mean + var.sqrt() * uniform(mean, -0.5, 0.5)
        norm.running_var = var * uniform(var, 0.5, 1.5)

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(off_by_half) for norm in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return model


@functools.cache
def family(name: str) -> tuple[nn.Module, Tensor, PermutationSpec]:
    """Return the family's network in float64 and eval mode, an input and its spec; read only."""
    build, side = FAMILIES[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    model = randomise(build().double(), x)
    return model, x, permutation_spec(model, x)


@pytest.fixture
def randomiser() -> Callable[[nn.Module, Tensor], nn.Module]:
    return randomise


@pytest.fixture(scope="module", params=FAMILIES)
def member(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, PermutationSpec]:
    return family(request.param)
