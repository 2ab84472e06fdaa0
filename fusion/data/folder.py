"""Images in one folder a class."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from fusion.data.augmentation import Augmentation
from fusion.data.image_tensors import RGB_MEAN, RGB_STD, ImageTensors
from fusion.errors import UserError, suggestion

_SUFFIXES = (".jpg", ".jpeg", ".png")
_MODES = {1: "L", 3: "RGB"}
# Bytes of an image file. Pillow lets go of the interpreter while it decodes, so threads double the
# speed on photographs; on thumbnails they only wait for each other (measured on 2 cores, 50,000
# JPEG of 32×32: 5 s without threads, 9 s with).
_THREADS_FROM = 4096
_GREY_MEAN, _GREY_STD = (0.449,), (0.226,)  # ImageNet's, averaged over the channels


def image_folder(
    root: str | Path,
    *,
    image_size: int | None = None,
    per_class: int | None = None,
    class_names: Sequence[str] | None = None,
    channels: Literal[1, 3] = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augmentation: Augmentation | None = Augmentation(),  # noqa: B008 (frozen)
) -> ImageTensors:
    """Load ``root/<class>/<name>.jpg`` (or jpeg, png) into memory, sorted by class and name.

    Args:
        root: folder with one sub-folder a class.
        image_size: side in pixels; each image is scaled until its shorter side has it and then
            cropped to the middle. By default the images keep their size, which all must share.
        per_class: use the first so many images of each class.
        class_names: the sub-folders that count, in the order of their labels; by default all,
            in alphabetical order.
        channels: 3 reads colour, 1 grey.
        mean: of each channel on the scale 0..1, for normalisation; ImageNet's by default. What
            matters is that it is what the network was trained with.
        std: the same for the standard deviation.
        augmentation: used when training asks for augmentation.

    Raises:
        UserError: a folder is missing or has no images, an image cannot be read, or sizes differ.
    """
    root = Path(root)
    if channels not in _MODES:
        raise UserError(f"channels: {channels} were asked for; images are read with 1 or 3")
    for option, value in (("image_size", image_size), ("per_class", per_class)):
        if value is not None and value < 1:
            raise UserError(f"{option}: {value} was asked for; give 1 or more, or none")
    names = _class_names(root, class_names)
    files = [_image_files(root / name)[:per_class] for name in names]
    paths = list(itertools.chain.from_iterable(files))
    read = partial(_read, mode=_MODES[channels], image_size=image_size)
    first = read(paths[0])
    pixels = np.empty((len(paths), *first.shape), dtype=np.uint8)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        threads = paths[0].stat().st_size >= _THREADS_FROM
        decoded = pool.map(read, paths) if threads else map(read, paths)
        progress = tqdm(decoded, total=len(paths), desc=f"reading {root}", unit="img", disable=None)
        for number, image in enumerate(progress):
            if image.shape != first.shape:
                raise UserError(
                    f"image_size: '{paths[number]}' is {image.shape[1]}×{image.shape[0]}, "
                    f"'{paths[0]}' is {first.shape[1]}×{first.shape[0]}; give one image_size"
                )
            pixels[number] = image
    labels = [label for label, found in enumerate(files) for _ in found]
    return ImageTensors(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels),
        class_names=names,
        mean=mean or (RGB_MEAN if channels == 3 else _GREY_MEAN),
        std=std or (RGB_STD if channels == 3 else _GREY_STD),
        augmentation=augmentation,
    )


def _class_names(root: Path, wanted: Sequence[str] | None) -> list[str]:
    if not root.is_dir():
        raise UserError(f"root: there is no folder '{root}'; give one with a sub-folder a class")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    found = [name for name in found if not name.startswith(".")]
    if not found:
        raise UserError(f"root: '{root}' has no sub-folders; images are sorted into one a class")
    for name in wanted or ():
        if name not in found:
            raise UserError(
                f"class_names: '{root}' has no sub-folder '{name}'{suggestion(name, found)}"
            )
    return found if wanted is None else list(wanted)


def _image_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(_SUFFIXES))
    if not names:
        raise UserError(
            f"root: '{folder}' has no images ({', '.join(_SUFFIXES)}); remove the folder, or "
            f"name the classes that count"
        )
    return [folder / name for name in names]


def _read(path: Path, *, mode: str, image_size: int | None) -> NDArray[np.uint8]:
    """Return one image as (H, W, C)."""
    try:
        with Image.open(path) as file:
            image = file.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"root: '{path}' cannot be read as an image ({error})") from error
    if image_size is not None:
        # `fit` scales the shorter side and crops the rest off both ends of the longer one.
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image, dtype=np.uint8))
