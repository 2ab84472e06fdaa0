from __future__ import annotations

import pytest
import torch

from fusion.data import ImageTensors, digits
from fusion.errors import UserError


def test_normalised_training_pixels_have_mean_zero_and_deviation_one(
    train_digits: ImageTensors,
) -> None:
    pixels = train_digits.normalise(train_digits.images)
    assert pixels.dtype == torch.float32
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_uint8_and_float_pixels_normalise_alike(train_digits: ImageTensors) -> None:
    as_float = ImageTensors(
        train_digits.images / 255,
        train_digits.labels,
        class_names=train_digits.class_names,
        mean=train_digits.mean,
        std=train_digits.std,
    )
    torch.testing.assert_close(as_float[3][0], train_digits[3][0])
    assert as_float[3][1] == train_digits[3][1]


def test_normalising_leaves_the_stored_pixels_alone(numbered: ImageTensors) -> None:
    before = numbered.images.clone()
    numbered.normalise(numbered.images)
    assert torch.equal(numbered.images, before)


def test_select_keeps_everything_but_the_images(train_digits: ImageTensors) -> None:
    chosen = train_digits.select(torch.tensor([5, 1]))
    assert torch.equal(chosen.images, train_digits.images[[5, 1]])
    assert chosen.labels.tolist() == train_digits.labels[[5, 1]].tolist()
    assert chosen.class_names == train_digits.class_names
    assert (chosen.mean, chosen.std) == (train_digits.mean, train_digits.std)
    assert chosen.augmentation == train_digits.augmentation


def test_moving_to_where_it_is_costs_nothing(train_digits: ImageTensors) -> None:
    assert train_digits.to("cpu") is train_digits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 8, 8)}, "images: the shape is"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0)}, "at least one image"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.int32)}, "the type is torch.int32"),
        ({"labels": torch.zeros(3)}, "labels: the shape is"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "labels: they run from 0 to 2, but 2"),
        ({"labels": torch.tensor([0, -1, 1, 0])}, "labels: they run from -1"),
        ({"original_labels": [3, 3]}, "different label"),
        ({"original_labels": [3]}, "different label"),
        ({"mean": [0.1, 0.2]}, "mean: 2 numbers for images of 1 channels"),
        ({"std": [0.0]}, "not above zero"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    fitting = {
        "images": torch.zeros(4, 1, 8, 8),
        "labels": torch.tensor([0, 1, 1, 0]),
        "class_names": ["a", "b"],
        "mean": [0.5],
        "std": [0.5],
    }
    ImageTensors(**fitting)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        ImageTensors(**fitting | change)  # type: ignore[arg-type]


def test_digits_without_the_channel_repeat_and_with_it() -> None:
    grey, colour = digits("val"), digits("val", channels=3)
    assert torch.equal(grey[0][0].expand(3, 8, 8), colour[0][0])
