"""Residual networks for 32×32 images (He et al., 2015, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.errors import UserError
from fusion.options import Units, Width, Within, checked

STAGE_CHANNELS = (16, 32, 64)  # at width 1
GROUPS = 4  # of channels, in group norm and in grouped convolutions
Depth = Annotated[int, Within(most=100_000)]  # He et al. went to 1,202
Norm = Literal["batch", "group", "layer", "none"]
Convolution = Literal["full", "grouped", "depthwise"]
Shortcut = Literal["A", "B"]


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, -56, -110, … for small images.

    A 3×3 convolution, three stages of n residual blocks at 16, 32 and 64 channels, the second and
    third of which halve the resolution, global average pooling and one linear layer. The names of
    the parameters are those of the widespread ``pytorch_resnet_cifar10`` checkpoints. Other norms
    and convolutions give the same network with and without the properties that merging methods rely
    on.

    Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2015).

    Args:
        depth: number of weighted layers, 6n+2.
        num_classes: size of the output.
        in_channels: channels of the images, whose sides may be anything from 4 pixels.
        width: factor on the channels of every stage.
        shortcut: where a block changes its shape, ``"A"`` takes every second pixel and adds
            channels of zeros (no parameters), ``"B"`` learns a 1×1 convolution.
        norm: what follows every convolution: ``"batch"`` norm; ``"group"`` norm in four groups of
            channels (Wu and He, 2018); ``"layer"`` norm over channels and pixels with a scale and
            a shift per channel (the same with one group); ``"none"``: the convolutions have
            biases, and the initial weights do what norms would (Zhang, Dauphin and Ma, "Fixup
            Initialization", 2019, without its scalar parameters): the first convolution of each
            of L blocks is scaled by 1/√L, the last one is 0. Norms are called ``bn1``, ``bn2``
            whatever their kind.
        conv: the 3×3 convolutions within the blocks: ``"full"``; ``"grouped"`` in four groups of
            channels, or ``"depthwise"``, each then followed by a 1×1 convolution across channels.

    Raises:
        UserError: if an option is outside its range, or four groups do not divide the channels.

    Shapes: ``forward`` takes (N, in_channels, H, W), gives logits (N, num_classes).
    """

    @checked
    def __init__(
        self,
        depth: Depth = 20,
        num_classes: Units = 10,
        in_channels: Units = 3,
        width: Width = 1,
        shortcut: Shortcut = "A",
        norm: Norm = "batch",
        conv: Convolution = "full",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(
                f"CifarResNet: depth must be 6n+2 (8, 14, 20, …, 56, …), not {depth}; "
                f"the nearest is {_nearest_depth(depth)}"
            )
        blocks = (depth - 2) // 6
        first, second, third = (max(1, round(width * channels)) for channels in STAGE_CHANNELS)
        _check_groups((first, second, third), norm, conv)
        make = _Parts(norm, conv)
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=make.bias)
        self.bn1 = make.norm_of(first)
        self.layer1 = _stage(first, first, blocks, 1, shortcut, make)
        self.layer2 = _stage(first, second, blocks, 2, shortcut, make)
        self.layer3 = _stage(second, third, blocks, 2, shortcut, make)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if norm == "none":
            self._scale_branches(3 * blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def _scale_branches(self, blocks: int) -> None:
        """Start each of ``blocks`` residual branches at 0, with a first layer of 1/√blocks."""
        for module in self.modules():
            if isinstance(module, BasicBlock):
                _last(module.conv1).weight.mul_(blocks**-0.5)
                _last(module.conv2).weight.zero_()


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with their norms, added to the block's input."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut, make: _Parts
    ) -> None:
        super().__init__()
        self.conv1 = make.convolution(in_channels, out_channels, stride)
        self.bn1 = make.norm_of(out_channels)
        self.conv2 = make.convolution(out_channels, out_channels, 1)
        self.bn2 = make.norm_of(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=make.bias),
                make.norm_of(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PadShortcut(nn.Module):
    """Option A of He et al.: every ``stride``-th pixel, and zeros for the channels to come.

    Half of the new channels come before the old ones and half after, as in the checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        added = out_channels - in_channels
        self.before = added // 2
        self.after = added - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


@dataclass(frozen=True)
class _Parts:
    """Factory of the convolutions and norms of a block."""

    norm: Norm
    conv: Convolution

    @property
    def bias(self) -> bool:
        """Whether convolutions have a bias: if no norm with a bias follows."""
        return self.norm == "none"

    def norm_of(self, channels: int) -> nn.Module:
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        if self.norm == "none":
            return nn.Identity()
        return nn.GroupNorm(GROUPS if self.norm == "group" else 1, channels)

    def convolution(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        if self.conv == "full":
            return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=self.bias)
        groups = GROUPS if self.conv == "grouped" else in_channels
        return nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=groups, bias=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=self.bias),
        )


def _stage(
    in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: Shortcut, make: _Parts
) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut, make)
    rest = (BasicBlock(out_channels, out_channels, 1, shortcut, make) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _last(convolution: nn.Module) -> nn.Conv2d:
    last = convolution[-1] if isinstance(convolution, nn.Sequential) else convolution
    assert isinstance(last, nn.Conv2d)
    return last


def _check_groups(channels: tuple[int, ...], norm: Norm, conv: Convolution) -> None:
    uneven = [count for count in channels if count % GROUPS]
    options = {"norm=group": norm == "group", "conv=grouped": conv == "grouped"}
    asked = " and ".join(option for option, given in options.items() if given)
    if asked and uneven:
        raise UserError(
            f"CifarResNet: {asked} takes {GROUPS} groups of channels, and a stage has {uneven[0]}; "
            f"choose a width with which all stages have a multiple of {GROUPS}"
        )


def _nearest_depth(depth: int) -> int:
    return 6 * max(1, round((depth - 2) / 6)) + 2
