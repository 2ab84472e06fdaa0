from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import fusion.data.folder
from fusion.data import ImageTensors, image_folder
from fusion.errors import UserError


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
    with pytest.raises(UserError, match="per_class: 0"):
        image_folder(folder, per_class=0)
    (folder / "eight").mkdir()
    with pytest.raises(UserError, match="eight' has no images"):
        image_folder(folder)
