"""CIFAR-10 through torchvision, downloaded on first use."""

from __future__ import annotations

from typing import Literal

import torch

from fusion.data.augmentation import Augmentation
from fusion.data.drawing import stratified_order
from fusion.data.image_tensors import ImageTensors
from fusion.data.seeds import seed_from
from fusion.errors import UserError
from fusion.options import FilePath, Whole, checked


@checked
def cifar10(
    root: FilePath,
    split: Literal["train", "val", "test"] = "train",
    *,
    val_images: Whole = 0,
    download: bool = True,
) -> ImageTensors:
    """Load CIFAR-10 (Krizhevsky 2009): 32×32 colour images of ten classes.

    Args:
        root: folder that holds, or will hold, torchvision's ``cifar-10-batches-py``.
        split: ``train`` (50,000 images less those held out), ``val`` (the images held out), or
            ``test`` (10,000).
        val_images: number of training images held out for validation, always the same ones; the
            counts of the classes differ by one at most.
        download: fetch the archive (170 MB) if ``root`` does not have it.

    Raises:
        UserError: an unknown split, nothing held out for ``val``, or data that are neither present
            nor downloadable.
    """
    from torchvision.datasets import CIFAR10

    if split == "val" and val_images < 1:
        raise UserError(
            "val_images: 0 images are held out, so the split 'val' is empty; give the same "
            "val_images, for example 5000, to 'train' and 'val'"
        )
    try:
        raw = CIFAR10(str(root), train=split != "test", download=download)
    except (RuntimeError, OSError) as error:
        cure = "check the network and the folder" if download else "set download=true"
        raise UserError(f"root: no CIFAR-10 in '{root}' ({error}); {cure}") from error
    dataset = ImageTensors(
        torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(raw.targets),
        class_names=raw.classes,
        augmentation=Augmentation(padding=4, flip=True),
    )
    if split == "test" or not val_images:
        return dataset
    if not 0 < val_images < len(dataset):
        raise UserError(
            f"val_images: {val_images} of {len(dataset)} training images; hold out fewer"
        )
    order = stratified_order(dataset.labels, seed_from("cifar10", "val"))
    chosen = order[:val_images] if split == "val" else order[val_images:]
    return dataset.select(chosen.sort().values)
