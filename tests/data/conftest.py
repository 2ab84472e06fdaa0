from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fusion.data import ImageFiles, ImageTensors, digits, image_folder


@pytest.fixture(scope="session")
def train_digits() -> ImageTensors:
    return digits("train")


@pytest.fixture
def folder(tmp_path: Path, train_digits: ImageTensors) -> Path:
    """Five digits of each of three classes, as 8×8 PNG files."""
    for label, name in ((2, "two"), (0, "zero"), (7, "seven")):
        (tmp_path / name).mkdir()
        images = train_digits.images[train_digits.labels == label][:5, 0]
        for number, image in enumerate(images):
            Image.fromarray(image.numpy()).save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def numbered() -> ImageTensors:
    """Ten 1×2×2 images whose pixels all are the image's number; normalisation does nothing."""
    images = torch.arange(10, dtype=torch.float32).view(10, 1, 1, 1).expand(10, 1, 2, 2)
    labels = torch.arange(10) % 3
    return ImageTensors(images, labels, class_names=["a", "b", "c"], mean=[0], std=[1])


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of scikit-learn's two photographs, JPEG files of several sizes: 8 and 6 of them."""
    root = tmp_path_factory.mktemp("photos")
    for name, count in (("flower", 6), ("china", 8)):
        (root / name).mkdir()
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for number in range(count):
            left, top = 25 * number, 10 * number
            box = (left, top, left + 180 + 20 * (number % 3), top + 200 - 25 * (number % 2))
            photo.crop(box).save(root / name / f"{number}.jpg", quality=90)
    return root


@pytest.fixture
def streamed(photos: Path) -> ImageFiles:
    """The photographs, 48×48, decoded when they are read."""
    dataset = image_folder(photos, image_size=48, in_memory=False)
    assert isinstance(dataset, ImageFiles)
    return dataset
