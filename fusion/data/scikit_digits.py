"""The 1,797 handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from fusion.data.augmentation import Augmentation
from fusion.data.image_tensors import ImageTensors
from fusion.options import checked

# The j-th image of each digit goes to the split that has j mod 10: 60, 10 and 30 %. A fixed rule
# needs no random numbers, so the split is the same with every version of every library; counting
# within the digit makes it stratified. The test split is large because a study needs its
# precision: at 95 % accuracy, 531 images leave a standard error of 0.9 points.
_PLACES = {"train": range(6), "val": range(6, 7), "test": range(7, 10)}
_WHITE = 16  # scikit-learn's images count black-and-white pixels in blocks of 4 by 4
_MEAN, _STD = 0.3057, 0.3761  # of the training split's pixels, on the scale 0..1


@checked
def digits(
    split: Literal["train", "val", "test"] = "train", *, channels: Literal[1, 3] = 1
) -> ImageTensors:
    """Load 8×8 grey images of handwritten digits (UCI Optdigits, through scikit-learn).

    The fixed stratified split has 1,087 images for training, 179 for validation, 531 for tests.
    Augmentation, when requested, shifts by one pixel at most and does not flip.

    Args:
        split: which part.
        channels: 3 repeats the grey channel for networks that expect colour.

    Raises:
        UserError: an unknown split or number of channels.
    """
    pixels, labels, place = _all_digits()
    chosen = torch.isin(place, torch.tensor(_PLACES[split]))
    return ImageTensors(
        pixels[chosen].unsqueeze(1).repeat(1, channels, 1, 1),
        labels[chosen],
        class_names=[str(label) for label in range(10)],
        mean=[_MEAN] * channels,
        std=[_STD] * channels,
        augmentation=Augmentation(padding=1, flip=False),
    )


@cache
def _all_digits() -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels, labels and places of all images, which are read once in a process."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = torch.from_numpy(raw.target).to(torch.int64)
    pixels = torch.from_numpy(raw.images).mul(255 / _WHITE).round().to(torch.uint8)
    place = torch.empty_like(labels)
    for label in torch.unique(labels):
        of_label = labels == label
        place[of_label] = torch.arange(int(of_label.sum())) % 10
    return pixels, labels, place
