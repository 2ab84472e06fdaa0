from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fusion.data import ImageTensors, digits


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
