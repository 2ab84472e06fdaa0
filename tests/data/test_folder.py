from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import fusion.data.folder
from fusion.data import (
    Augmentation,
    ImageFiles,
    ImageTensors,
    Preprocessing,
    batches,
    image_folder,
)
from fusion.errors import UserError
from fusion.target import build


def test_pixels_and_labels_are_the_files(folder: Path, train_digits: ImageTensors) -> None:
    dataset = image_folder(folder, channels=1)
    assert dataset.class_names == ("seven", "two", "zero")
    assert torch.bincount(dataset.labels).tolist() == [5, 5, 5]
    expected = train_digits.images[train_digits.labels == 2][:5]
    assert torch.equal(dataset.images[dataset.labels == 1], expected)
    colour = image_folder(folder)
    assert torch.equal(colour.images, dataset.images.expand(-1, 3, -1, -1))


def test_threads_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = image_folder(folder)
    monkeypatch.setattr(fusion.data.folder, "_THREADS_FROM", 0)
    assert torch.equal(image_folder(folder).images, alone.images)


def test_the_order_of_the_classes_can_be_given(folder: Path) -> None:
    dataset = image_folder(folder, class_names=["zero", "two"], per_class=2)
    assert dataset.class_names == ("zero", "two")
    assert dataset.labels.tolist() == [0, 0, 1, 1]


def test_images_that_are_passed_over_come_first(folder: Path) -> None:
    whole = image_folder(folder)
    first, others = image_folder(folder, per_class=2), image_folder(folder, skip=2, per_class=2)
    for label in range(3):
        images = whole.images[whole.labels == label]
        assert torch.equal(first.images[first.labels == label], images[:2])
        assert torch.equal(others.images[others.labels == label], images[2:4])
    with pytest.raises(UserError, match="has 5 images, and 5 are passed over"):
        image_folder(folder, skip=5)


def test_image_size_scales_the_shorter_side_and_crops_the_middle(tmp_path: Path) -> None:
    (tmp_path / "bars").mkdir()
    bars = torch.zeros(8, 24, 3, dtype=torch.uint8)
    bars[:, 8:16] = 255  # white in the middle third
    Image.fromarray(bars.numpy()).save(tmp_path / "bars" / "bars.JPEG", quality=100)
    dataset = image_folder(tmp_path, image_size=4)
    assert dataset.images.shape == (1, 3, 4, 4)
    assert dataset.images.min() > 200


def test_a_truncated_image_and_mixed_sizes_are_refused_by_name(folder: Path) -> None:
    Image.new("L", (9, 8)).save(folder / "two" / "9.png")
    with pytest.raises(UserError, match=r"two/9\.png' is 9×8, .*seven/0\.png' is 8×8; give one"):
        image_folder(folder)
    whole = (folder / "two" / "9.png").read_bytes()
    (folder / "two" / "9.png").write_bytes(whole[:20])
    with pytest.raises(UserError, match=r"two/9\.png' cannot be read as an image"):
        image_folder(folder)


def test_missing_and_empty_folders_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        image_folder(folder / "nowhere")
    with pytest.raises(UserError, match="has no sub-folders"):
        image_folder(folder / "two")
    with pytest.raises(UserError, match="no sub-folder 'tow'; did you mean 'two'"):
        image_folder(folder, class_names=["tow"])
    with pytest.raises(UserError, match="per_class is 0"):
        image_folder(folder, per_class=0)
    (folder / "eight").mkdir()
    with pytest.raises(UserError, match="eight' has no images"):
        image_folder(folder)


def test_hidden_files_and_other_files_are_passed_over(folder: Path) -> None:
    for name in ("._0.png", "notes.txt", "Thumbs.db"):
        (folder / "two" / name).write_bytes(b"no image")
    assert len(image_folder(folder)) == 15


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 48},
        {"image_size": 48, "resize": 56, "interpolation": "bicubic"},
        {"image_size": 40, "channels": 1, "mean": [0.4], "std": [0.2], "per_class": 3},
    ],
)
def test_streamed_images_are_those_in_memory(photos: Path, options: dict[str, object]) -> None:
    held = image_folder(photos, **options)  # type: ignore[arg-type]
    streamed = image_folder(photos, in_memory=False, draft=False, **options)  # type: ignore[arg-type]
    assert isinstance(held, ImageTensors)
    assert isinstance(streamed, ImageFiles)
    for one, other in zip(
        batches(held, batch_size=5, shuffle=True),
        batches(streamed, batch_size=5, shuffle=True, workers=0),
        strict=True,
    ):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert torch.equal(held[3][0], streamed[3][0])
    for fact in ("class_names", "original_labels", "num_classes", "mean", "std"):
        assert getattr(held, fact) == getattr(streamed, fact)
    assert torch.equal(held.labels, streamed.labels)


def test_size_decides_without_decoding(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_ = 14 * 3 * 48 * 48
    monkeypatch.setattr(fusion.data.folder, "IN_MEMORY_BYTES", bytes_)
    assert isinstance(image_folder(photos, image_size=48), ImageTensors)
    monkeypatch.setattr(fusion.data.folder, "IN_MEMORY_BYTES", bytes_ - 1)
    assert isinstance(image_folder(photos, image_size=48, in_memory=True), ImageTensors)

    def no_decoding(*_: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "load", no_decoding)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    streamed = image_folder(photos, image_size=48)
    assert repr(streamed) == "ImageFiles(14 images 3x48x48, 2 classes)"
    assert torch.bincount(streamed.labels).tolist() == [8, 6]
    assert streamed.select(torch.tensor([13, 0])).labels.tolist() == [1, 0]
    assert isinstance(image_folder(photos), ImageFiles)  # judged by the header of the first
    with pytest.raises(AssertionError, match="an image was decoded"):
        streamed[0]


def test_streamed_files_that_cannot_be_read_are_named(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = image_folder(folder, in_memory=False, channels=1)
    file = folder / "two" / "3.png"
    whole = file.read_bytes()
    for damaged in (whole[:60], b"GIF89a", b"", whole[:40] + b"xxxx" + whole[44:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^root: '.*two/3\.png' cannot be read as an image \("):
            list(batches(streamed, batch_size=4, workers=0))
    Image.new("I;16", (8, 8)).save(file)
    with pytest.raises(UserError, match=r"two/3\.png' .*kind I;16; save it with 8 bits"):
        list(batches(streamed, batch_size=4, workers=1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"china/0\.jpg' .*decompression bomb"):
        image_folder(photos, image_size=48)


def test_sizes_that_differ_are_refused_when_they_meet(photos: Path) -> None:
    with pytest.raises(
        UserError, match=r"3x\d+x\d+ uint8 at index 0 and 3x\d+x\d+ uint8 at index 1"
    ):
        next(batches(image_folder(photos, in_memory=False), batch_size=4))


def test_transforms_are_built_from_yaml(photos: Path) -> None:
    crop = {"_target_": "torchvision.transforms.v2.RandomResizedCrop", "size": 24}
    flip = {"_target_": "torchvision.transforms.v2.RandomHorizontalFlip", "p": 1.0}
    spec = {"_target_": "fusion.data.image_folder", "root": str(photos), "image_size": 32}
    streamed = build({**spec, "augmentation": [crop, flip]})
    assert isinstance(streamed, ImageFiles)  # though it is small
    for augmented, side in ((True, 24), (False, 32)):
        images, _ = next(batches(streamed, batch_size=3, augment=augmented))
        assert images.shape == (3, 3, side, side)
    # The same unbuilt, as a mapping gives it to plain Python.
    flipped = image_folder(photos, image_size=32, augmentation=flip)
    whole = flipped.decoding.open(flipped.path(0))  # type: ignore[union-attr]
    pixels = flipped.pixels(0, augment=True)
    assert pixels.shape == (3, whole.height, whole.width)  # its sizes replace the set's
    mirrored = torch.from_numpy(np.array(whole)).permute(2, 0, 1).flip(-1)
    assert torch.equal(pixels, mirrored)


def normalised(image: Image.Image) -> torch.Tensor:
    return v2.Normalize([0.4] * 3, [0.1] * 3)(to_floats(image))


def to_floats(image: Image.Image) -> torch.Tensor:
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)


def test_augmentation_ends_before_normalisation(photos: Path) -> None:
    streamed = image_folder(photos, augmentation=to_floats)
    images, _ = next(batches(streamed, batch_size=1, augment=True))
    assert (images[0] - streamed[0][0]).abs().max() < 1e-5  # normalised once
    for wrong, message in (
        (normalised, "values from .*leave out its normalisation"),
        (np.asarray, "it gives a ndarray"),
        (lambda image: to_floats(image)[:1], r"shape \(1, .*has 3 channels"),
        (lambda image: to_floats(image).long(), "it gives torch.int64"),
    ):
        with pytest.raises(UserError, match=f"^augmentation: .*{message}"):
            next(batches(image_folder(photos, augmentation=wrong), batch_size=1, augment=True))
    with pytest.raises(UserError, match="a transform takes whole image files"):
        image_folder(photos, augmentation=to_floats, in_memory=True)
    with pytest.raises(UserError, match="augmentation is 3; give"):
        image_folder(photos, augmentation=3)  # type: ignore[arg-type]


def test_what_is_given_wins_over_the_preprocessing(photos: Path) -> None:
    own = Preprocessing([0.4] * 3, [0.3] * 3, resize=64, crop=48, interpolation="bicubic")  # type: ignore[arg-type]
    for in_memory in (True, False):
        as_published = image_folder(photos, preprocessing=own, in_memory=in_memory)
        by_hand = image_folder(
            photos, image_size=48, resize=64, interpolation="bicubic", mean=[0.4] * 3, std=[0.3] * 3
        )
        assert torch.equal(as_published[2][0], by_hand[2][0])
    smaller = image_folder(photos, preprocessing=own, image_size=24, mean=[0.5] * 3)
    assert smaller.mean == (0.5,) * 3
    assert smaller.std == (0.3,) * 3
    assert torch.equal(
        smaller.pixels(0),
        image_folder(photos, image_size=24, resize=32, interpolation="bicubic").pixels(0),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels is 2; give 1 or 3"),
        ({"image_size": 0}, "image_size is 0"),
        ({"resize": 64}, "resize: .*give image_size"),
        ({"image_size": 64, "resize": 32}, "resize: .*not below it"),
        ({"interpolation": "bicubik"}, "no 'bicubik'; did you mean 'bicubic'"),
        ({"in_memory": "no"}, "in_memory is 'no'; give true or false, or auto"),
        ({"mean": [0.5]}, "mean: 1 numbers for images of 3 channels"),
        ({"mean": [0.5], "in_memory": False}, "mean: 1 numbers for images of 3 channels"),
    ],
)
def test_impossible_options_are_refused(
    photos: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        image_folder(photos, **{"image_size": 32} | options if "mean" in options else options)  # type: ignore[arg-type]


def test_an_augmentation_is_the_same_option_in_memory_and_streamed(photos: Path) -> None:
    own = {"_target_": "fusion.data.Augmentation", "padding": 2, "flip": False}
    for in_memory in (True, False):
        dataset = image_folder(photos, image_size=32, augmentation=own, in_memory=in_memory)
        assert dataset.augmentation == Augmentation(padding=2, flip=False)
