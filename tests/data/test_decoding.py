from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from fusion.data import ImageTensors
from fusion.data.decoding import Decoding


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph of 1920×1281 pixels (enlarged three times, and sharpened by its edges)."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    image = image.resize((1920, 1281), Image.Resampling.LANCZOS)
    image.save(tmp_path / "large.jpg", quality=92)
    return tmp_path / "large.jpg"


@pytest.mark.parametrize(
    ("resize", "crop", "interpolation"),
    [(64, 56, "bilinear"), (57, 40, "bicubic"), (33, 33, "bilinear"), (300, 299, "bilinear")],
)
def test_resize_and_crop_are_those_of_torchvision(
    photos: Path, resize: int, crop: int, interpolation: str
) -> None:
    method = v2.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(resize, method), v2.CenterCrop(crop)])
    ours = Decoding(3, crop, resize, interpolation)
    for path in sorted(photos.glob("*/*.jpg"))[:6]:
        assert np.array_equal(ours.read(path), np.asarray(theirs(Image.open(path))))


@pytest.mark.parametrize("crop", [None, 96])
def test_the_draft_of_a_large_jpeg_is_nearly_the_whole(
    photo: Path, train_digits: ImageTensors, crop: int | None
) -> None:
    # Sharp edges are the hard case: digits enlarged to blocks beside the grid of JPEG.
    tiles = train_digits.images[:12, 0].view(3, 4, 8, 8).permute(0, 2, 1, 3).reshape(24, 32)
    blocks = photo.with_name("blocks.jpg")
    sharp = Image.fromarray(tiles.numpy()).resize((1270, 950), Image.Resampling.NEAREST)
    sharp.convert("RGB").save(blocks, quality=95)
    for path, bound in ((photo, 12), (blocks, 24)):
        options = {"image_size": crop or 120, "resize": None if crop is None else 120}
        whole = Decoding(**options).read(path).astype(int)
        draft = Decoding(**options, draft=True).read(path).astype(int)
        difference = np.abs(whole - draft)
        assert 0 < difference.mean() < 1  # grey levels of 255; 0 would be no draft
        assert difference.max() < bound


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_draft_is_not_shifted(photo: Path, orientation: int) -> None:
    # Sides of 8n + 1 pixels leave the most of a pixel over.
    exif = Image.Exif()
    exif[0x0112] = orientation
    odd = photo.with_name("odd.jpg")
    Image.open(photo).crop((0, 0, 801, 601)).save(odd, quality=95, exif=exif)
    for resize in (None, 40):
        whole = Decoding(image_size=36, resize=resize).read(odd).astype(int)
        draft = Decoding(image_size=36, resize=resize, draft=True).read(odd).astype(int)
        assert 0 < np.abs(whole - draft).mean() < 1


def test_no_draft_where_it_would_leave_less_than_twice_the_size(photo: Path) -> None:
    for resize in (321, 640):  # the shorter side is 1281
        plain, draft = (
            Decoding(3, 300, resize, draft=draft).read(photo) for draft in (False, True)
        )
        assert np.array_equal(plain, draft) == (resize > 1281 / 4)


@pytest.mark.parametrize("turned", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, turned: int) -> None:
    upright = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = turned
    # What a camera stores that was held so: the opposite of what the viewer does.
    opposite = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(opposite[turned]) if turned > 1 else upright
    stored.save(tmp_path / "photo.png", exif=exif)
    decoding = Decoding()
    assert np.array_equal(decoding.read(tmp_path / "photo.png"), np.asarray(upright))
    assert decoding.shape(tmp_path / "photo.png") == (3, 40, 60)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1"])
def test_other_kinds_of_pixels_become_grey_and_colour(tmp_path: Path, mode: str) -> None:
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop((0, 0, 30, 20)).convert(mode)
    path = tmp_path / f"photo.{'jpg' if mode == 'CMYK' else 'png'}"
    photo.save(path)
    for channels, converted in ((1, "L"), (3, "RGB")):
        pixels = Decoding(channels=channels).read(path)
        assert pixels.shape == (20, 30, channels)
        assert np.array_equal(pixels.squeeze(), np.asarray(Image.open(path).convert(converted)))


def test_torch_takes_the_pixels_without_a_warning(
    photo: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.from_numpy(Decoding(3, 8).read(photo)).add_(1)
    assert not recwarn.list
