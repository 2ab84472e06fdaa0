"""Residual networks for 32×32 images (He et al., 2015, section 4.2)."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fusion.errors import UserError
from fusion.options import Units, Width, Within, checked

STAGE_CHANNELS = (16, 32, 64)  # at width 1
Depth = Annotated[int, Within(most=100_000)]  # He et al. went to 1,202


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44, -56, -110, … for small images.

    A 3×3 convolution, three stages of n residual blocks at 16, 32 and 64 channels, the second and
    third of which halve the resolution, global average pooling and one linear layer. The names of
    the parameters are those of the widespread ``pytorch_resnet_cifar10`` checkpoints.

    Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2015).

    Args:
        depth: number of weighted layers, 6n+2.
        num_classes: size of the output.
        in_channels: channels of the images, whose sides may be anything from 4 pixels.
        width: factor on the channels of every stage.
        shortcut: where a block changes its shape, ``"A"`` takes every second pixel and adds
            channels of zeros (no parameters), ``"B"`` learns a 1×1 convolution.

    Raises:
        UserError: if an option is outside its range.

    Shapes: ``forward`` takes (N, in_channels, H, W), gives logits (N, num_classes).
    """

    @checked
    def __init__(
        self,
        depth: Depth = 20,
        num_classes: Units = 10,
        in_channels: Units = 3,
        width: Width = 1,
        shortcut: Literal["A", "B"] = "A",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(
                f"CifarResNet: depth must be 6n+2 (8, 14, 20, …, 56, …), not {depth}; "
                f"the nearest is {_nearest_depth(depth)}"
            )
        blocks = (depth - 2) // 6
        first, second, third = (max(1, round(width * channels)) for channels in STAGE_CHANNELS)
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks, 1, shortcut)
        self.layer2 = _stage(first, second, blocks, 2, shortcut)
        self.layer3 = _stage(second, third, blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the block's input."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Literal["A", "B"]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
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


def _stage(
    in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: Literal["A", "B"]
) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    rest = (BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _nearest_depth(depth: int) -> int:
    return 6 * max(1, round((depth - 2) / 6)) + 2
