from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2.functional import resize

from fusion.data import (
    ImageFiles,
    ImageTensors,
    ImageView,
    LabelledImages,
    as_rgb,
    batches,
    blurred,
    faded,
    greyed,
    grouped,
    image_folder,
    inverted,
    noisy,
    quarter_turns,
    renormalised,
    resized,
    rotated,
)
from fusion.errors import UserError
from fusion.target import build

View = Callable[[Dataset[object]], LabelledImages]

VIEWS: dict[str, View] = {
    "rotated": partial(rotated, turns=3),
    "inverted": inverted,
    "blurred": partial(blurred, sigma=1.5),
    "noisy": partial(noisy, deviation=0.1, seed=4),
    "faded": partial(faded, contrast=0.4),
    "greyed": greyed,
    "resized": partial(resized, size=20),
    "renormalised": partial(renormalised, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]),
    "quarter_turns": partial(quarter_turns, seed=2),
    "grouped": partial(grouped, groups={"all": ["china", "flower"]}),
}


def pairs(dataset: ImageTensors, *, stated: bool) -> Dataset[object]:
    """The same images as somebody else's, who states the normalisation or does not."""
    found = TensorDataset(dataset.normalise(dataset.images), dataset.labels)
    found.classes = list(dataset.class_names)  # type: ignore[attr-defined]
    if stated:
        found.mean, found.std = list(dataset.mean), list(dataset.std)  # type: ignore[attr-defined]
    return found


def read(dataset: Dataset[object], *, augment: bool = False) -> tuple[Tensor, Tensor]:
    return next(batches(dataset, batch_size=20, augment=augment))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_same_in_memory_streamed_and_of_other_data_sets(
    photos: Path, name: str
) -> None:
    held = image_folder(photos, image_size=48, in_memory=True)
    streamed = image_folder(photos, image_size=48, in_memory=False, draft=False)
    before = held.images.clone()
    expected = VIEWS[name](held)
    assert isinstance(expected, ImageTensors)
    assert torch.equal(held.images, before)
    view = VIEWS[name](streamed)
    assert isinstance(view, ImageView)
    assert view.class_names == expected.class_names
    one, other = read(expected), read(view)
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-5)
    assert torch.equal(one[1], other[1])
    assert torch.equal(read(view)[0], other[0])  # and at every reading
    # Without rounding to whole grey levels, of which a deviation has 60.
    foreign = VIEWS[name](pairs(held, stated=True))
    torch.testing.assert_close(read(foreign)[0], one[0], rtol=0, atol=0.6 / 50)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_needs_pixels_says_so(photos: Path, name: str) -> None:
    held = image_folder(photos, image_size=48, in_memory=True)
    unknown = pairs(held, stated=False)
    if name in ("inverted", "noisy", "faded", "greyed", "renormalised"):
        with pytest.raises(
            UserError, match=rf"^{name}: TensorDataset\(14 .*attributes mean and std"
        ):
            VIEWS[name](unknown)
    else:
        expected, found = read(VIEWS[name](held))[0], read(VIEWS[name](unknown))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0.6 / 50)


def test_inverting_twice_is_the_identity(train_digits: ImageTensors, streamed: ImageFiles) -> None:
    once = inverted(train_digits)
    assert isinstance(once, ImageTensors)
    assert torch.equal(once.images, 255 - train_digits.images)
    assert torch.equal(inverted(once).images, train_digits.images)
    assert torch.equal(inverted(inverted(streamed))[3][0], streamed[3][0])


def test_four_turns_are_the_identity(train_digits: ImageTensors, streamed: ImageFiles) -> None:
    assert torch.equal(rotated(rotated(train_digits, 1), 3).images, train_digits.images)
    assert torch.equal(rotated(train_digits, 1).images, torch.rot90(train_digits.images, 1, (2, 3)))
    assert torch.equal(rotated(rotated(streamed, 2), 2)[3][0], streamed[3][0])


def test_blurring_keeps_the_mean_and_takes_detail_away(train_digits: ImageTensors) -> None:
    def roughness(dataset: LabelledImages) -> Tensor:
        return read(dataset)[0].diff(dim=-1).square().mean()

    soft, softer = blurred(train_digits, 0.5), blurred(train_digits, 2)
    assert roughness(softer) < roughness(soft) < roughness(train_digits)
    grey = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    flat = ImageTensors(grey, torch.zeros(1), class_names=["g"], mean=[0], std=[1])
    assert torch.equal(blurred(flat, 1).images, grey)


def test_noise_has_its_deviation_and_depends_on_seed_and_image(train_digits: ImageTensors) -> None:
    grey = ImageTensors(
        torch.full((300, 1, 8, 8), 0.5), torch.zeros(300), class_names=["g"], mean=[0], std=[1]
    )
    noise = noisy(grey, 0.1).images - 0.5
    assert abs(noise.std() - 0.1) < 0.002
    assert abs(noise.mean()) < 0.002
    assert abs((noise[0] * noise[1]).mean()) < 0.01  # images differ
    assert torch.equal(noisy(grey, 0.1).images, noisy(grey, 0.1).images)
    assert not torch.equal(noisy(grey, 0.1, seed=1).images, noisy(grey, 0.1).images)
    assert noisy(train_digits, 5.0).images.unique().tolist() == [*range(256)]  # clipped


def test_fading_shrinks_the_contrast_about_grey(train_digits: ImageTensors) -> None:
    pixels, faint = train_digits.images.float() / 255, faded(train_digits, 0.25).images / 255
    assert (faint - 0.5 - 0.25 * (pixels - 0.5)).abs().max() <= 0.5 / 255 + 1e-6  # rounding
    assert torch.equal(faded(train_digits, 1).images, train_digits.images)


def test_without_colour_all_channels_are_the_luminance(streamed: ImageFiles) -> None:
    red, green, blue = streamed.pixels(0).float()
    luminance = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    for channel in greyed(streamed).pixels(0).float():
        assert (channel - luminance).abs().max() <= 1
    assert torch.equal(greyed(greyed(streamed))[0][0], greyed(streamed)[0][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: rotated(data, 0), "turns is 0; give 1, 2 or 3"),
        (lambda data: blurred(data, 0), "sigma is 0; give a number above 0"),
        (lambda data: blurred(data, 3), "reach 9 pixels far, the images have 8x8"),
        (lambda data: noisy(data, -1), "deviation is -1"),
        (lambda data: faded(data, 0), "contrast is 0"),
        (greyed, "has 1 channels; give an RGB set"),
        (lambda data: resized(data, 0), "size is 0"),
        (lambda data: renormalised(data, mean=[0] * 3, std=[1]), "3 and 1 numbers"),
        (lambda data: renormalised(data, mean=[0], std=[0]), "not above zero"),
    ],
)
def test_impossible_views_are_refused(train_digits: ImageTensors, make: View, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(train_digits)


def test_digits_become_what_a_network_for_cifar_takes(train_digits: ImageTensors) -> None:
    spec = {
        "_target_": "fusion.data.as_rgb",
        "dataset": {
            "_target_": "fusion.data.resized",
            "size": 32,
            "dataset": {"_target_": "fusion.data.digits", "split": "train"},
        },
    }
    colour = build(spec)
    assert colour.images.shape == (1087, 3, 32, 32)
    assert colour.images.dtype == torch.uint8
    assert colour.augmentation.padding == 4  # of 32 pixels what 1 was of 8
    by_torchvision = resize(train_digits.images, [32, 32])
    for channel in colour.images.unbind(1):
        assert (channel.int() - by_torchvision[:, 0].int()).abs().max() <= 1
    normalised = colour.normalise(colour.images)
    assert torch.equal(normalised[:, 2], normalised[:, 0])  # mean and std are repeated as well
    assert as_rgb(colour) is colour


def test_renormalised_pixels_are_the_same_pixels(train_digits: ImageTensors) -> None:
    plain = renormalised(train_digits, mean=[0], std=[1])
    assert torch.equal(plain.images, train_digits.images)
    assert (plain[0][0] - train_digits.images[0] / 255).abs().max() < 1e-6


def test_an_augmentation_of_pixels_comes_after_the_view(photos: Path) -> None:
    held = image_folder(photos, image_size=48, in_memory=True)
    streamed = image_folder(photos, image_size=48, in_memory=False, draft=False)
    for dataset in (held, streamed):
        white = inverted(dataset)
        images, _ = read(white, augment=True)
        black = white.normalise(torch.zeros(1, 3, 1, 1))
        border = torch.cat([images[:, :, 0], images[:, :, -1]], dim=-1)
        assert (border == black[:, :, 0]).any()  # padded with black, not with inverted black
