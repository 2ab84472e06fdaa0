"""Random crop and horizontal flip of a whole batch in one gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.options import Within, checked

Padding = Annotated[int, Within(least=0, most=65_535)]


@checked
@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images: He et al. (2015) crop 4 pixels and flip on CIFAR-10.

    Args:
        padding: black pixels added on each side before a crop of the original size is taken.
        flip: mirror half of the images left to right; wrong for digits and letters.
    """

    padding: Padding = 4
    flip: bool = True

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw for ``count`` images: (count, 3) int64 rows of top, left and flip, on the CPU."""
        corners = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat([corners, flips], dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return ``images`` (N, C, H, W), of any dtype, cropped and flipped as drawn."""
        height, width = images.shape[-2:]
        top, left, flip = draws.to(images.device, non_blocking=True).unsqueeze(-1).unbind(1)
        rows = top + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        columns = left + torch.where(flip.bool(), width - 1 - columns, columns)
        padded = F.pad(images, [self.padding] * 4)
        image = torch.arange(len(images), device=images.device)[:, None, None]
        # Indices on both sides of the channels put the channels last; the view puts them back.
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def of_one(self, image: Tensor) -> Tensor:
        """Return one image (C, H, W) augmented by a draw from torch's global generator."""
        return self.apply(image[None], self.draw(1, torch.default_generator))[0]
