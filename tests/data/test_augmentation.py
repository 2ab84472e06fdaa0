from __future__ import annotations

import pytest
import torch

from fusion.data import Augmentation, ImageTensors
from fusion.errors import UserError


def test_every_crop_and_flip_is_the_one_drawn(train_digits: ImageTensors) -> None:
    images = train_digits.images[:40].repeat(1, 3, 1, 1)
    augmentation = Augmentation(padding=2, flip=True)
    draws = augmentation.draw(40, torch.Generator().manual_seed(0))
    result = augmentation.apply(images, draws)
    padded = torch.nn.functional.pad(images, [2, 2, 2, 2])
    for image, (top, left, flip), got in zip(padded, draws.tolist(), result, strict=True):
        expected = image[:, top : top + 8, left : left + 8]
        assert torch.equal(got, expected.flip(-1) if flip else expected)


def test_draws_reach_every_offset_and_both_sides() -> None:
    draws = Augmentation(padding=1, flip=True).draw(500, torch.Generator().manual_seed(0))
    assert [torch.unique(column).tolist() for column in draws.T] == [[0, 1, 2], [0, 1, 2], [0, 1]]
    unflipped = Augmentation(padding=1, flip=False).draw(500, torch.Generator().manual_seed(0))
    assert not unflipped[:, 2].any()


def test_negative_padding_is_refused() -> None:
    with pytest.raises(UserError, match="padding is -1"):
        Augmentation(padding=-1)
