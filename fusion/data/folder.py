"""Images in one folder per class: small sets in memory, large ones decoded when they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fusion.data.augmentation import Augmentation
from fusion.data.decoding import Decoding, FileTransform
from fusion.data.image_files import ImageFiles
from fusion.data.image_tensors import ImageTensors
from fusion.data.labelled_images import RGB_MEAN, RGB_STD
from fusion.data.preprocessing import Preprocessing
from fusion.errors import UserError, suggestion
from fusion.options import (
    NON_EMPTY,
    Count,
    FilePath,
    Names,
    Pixels,
    TargetMapping,
    Text,
    Whole,
    checked,
)
from fusion.target import build_nested

# Sets whose decoded pixels take up to this are kept in memory: `batches` copies them to the device
# whole, and any machine that trains a network can spare that much. CIFAR-10 takes 0.15 GiB, 7,000
# photographs of 224×224 pixels 1 GiB.
IN_MEMORY_BYTES = 2**30

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Bytes of an image file. Pillow releases the GIL while it decodes, so threads double the speed on
# photographs; on thumbnails they only wait for each other (measured on 2 cores, 50,000 JPEG of
# 32×32: 5 s without threads, 9 s with).
_THREADS_FROM = 4096
_GREY_MEAN, _GREY_STD = (0.449,), (0.226,)  # ImageNet's, averaged over the channels


@checked
def image_folder(
    root: FilePath,
    *,
    image_size: Pixels | None = None,
    resize: Pixels | None = None,
    interpolation: Text | None = None,
    per_class: Count | None = None,
    skip: Whole = 0,
    class_names: Names | None = None,
    channels: Literal[1, 3] = 3,
    mean: Annotated[Sequence[float], NON_EMPTY] | None = None,
    std: Annotated[Sequence[float], NON_EMPTY] | None = None,
    preprocessing: Preprocessing | None = None,
    augmentation: Augmentation
    | FileTransform
    | TargetMapping
    | Annotated[Sequence[Augmentation | FileTransform | TargetMapping], NON_EMPTY]
    | None = Augmentation(),  # noqa: B008 (frozen)
    in_memory: bool | Literal["auto"] = "auto",
    draft: bool = True,
) -> ImageTensors | ImageFiles:
    """Load ``root/<class>/<name>.jpg`` (or png, webp, …), sorted by class and name.

    Files of other kinds and hidden files are ignored. Images are turned upright as their EXIF
    orientation says.

    Args:
        root: folder with one sub-folder per class.
        image_size: side in pixels of the square cropped from the middle of each image; before,
            the image is scaled until its shorter side has ``resize`` pixels. By default the
            images keep their size, which all must share.
        resize: see above; ``image_size`` by default.
        interpolation: resampling filter (``bilinear``, ``bicubic``, ``lanczos``, …), which widens
            when an image shrinks; ``bilinear`` by default.
        per_class: number of images used of each class, the first ones.
        skip: number of images of each class that are skipped first; with ``skip`` equal to another
            set's ``per_class``, the two have no image in common.
        class_names: the sub-folders that count, in the order of their labels; by default all,
            in alphabetical order.
        channels: 3 reads colour, 1 grey.
        mean: of each channel on the scale 0..1, for normalisation; ImageNet's by default. It must
            be the mean that the network was trained with.
        std: the same for the standard deviation.
        preprocessing: preprocessing that a network's weights expect, see
            :func:`fusion.data.preprocessing_of`. The options above take precedence, and an
            ``image_size`` alone scales its ``resize`` in proportion.
        augmentation: used when training asks for augmentation. Besides :class:`Augmentation` it may
            be a ``torchvision.transforms.v2`` transform without ``Normalize``, a mapping with
            ``_target_`` that builds one, or a list of these, applied in turn. Such a transform
            takes the whole image instead of the resized and cropped one, and the set is not in
            memory then.
        in_memory: keep all pixels in one tensor (:class:`ImageTensors`), or decode each image
            on access (:class:`ImageFiles`). ``auto`` keeps up to ``IN_MEMORY_BYTES``,
            judged by the number of files and the size of the first.
        draft: decode large JPEG files of a set that is not in memory at a reduced size where
            twice the requested size remains; see :class:`Decoding`. False decodes them in full.

    Raises:
        UserError: a folder is missing or has no images, an image cannot be read, sizes differ,
            or options exclude each other. Of a set that is not in memory, files are first looked
            at when they are read.
    """
    root = Path(root)
    if preprocessing is not None:
        if resize is None:
            share = 1 if image_size is None else image_size / preprocessing.crop
            resize = round(preprocessing.resize * share)
        image_size = image_size or preprocessing.crop
        interpolation = interpolation or preprocessing.interpolation
        mean, std = mean or preprocessing.mean, std or preprocessing.std
    decoding = Decoding(channels, image_size, resize, interpolation or "bilinear")
    transform = _transform(augmentation)
    of_files = transform is not None and not isinstance(transform, Augmentation)
    if of_files and in_memory is True:
        raise UserError(
            "augmentation: a transform takes whole image files, a set in memory has cropped ones; "
            "give in_memory=false, or an Augmentation"
        )
    names = _class_names(root, class_names)
    files = [_chosen(root / name, skip, per_class) for name in names]
    paths = [f"{name}/{file}" for name, found in zip(names, files, strict=True) for file in found]
    labels = torch.tensor([label for label, found in enumerate(files) for _ in found])
    mean = mean or (RGB_MEAN if channels == 3 else _GREY_MEAN)
    std = std or (RGB_STD if channels == 3 else _GREY_STD)
    if in_memory == "auto":
        size = len(paths) * math.prod(decoding.shape(root / paths[0]))
        in_memory = not of_files and size <= IN_MEMORY_BYTES
    if in_memory:
        return ImageTensors(
            _read_all(root, paths, decoding),
            labels,
            class_names=names,
            mean=mean,
            std=std,
            augmentation=transform if isinstance(transform, Augmentation) else None,
        )
    return ImageFiles(
        root,
        paths,
        labels,
        class_names=names,
        decoding=Decoding(channels, image_size, resize, decoding.interpolation, draft),
        mean=mean,
        std=std,
        augmentation=transform,
    )


def _transform(
    augmentation: Augmentation | FileTransform | Mapping[str, Any] | Sequence[Any] | None,
) -> Augmentation | FileTransform | None:
    built = build_nested(augmentation)
    if isinstance(built, list | tuple):
        from torchvision.transforms import v2

        built = v2.Compose(list(built))
    if built is not None and not isinstance(built, Augmentation) and not callable(built):
        raise UserError(
            f"augmentation: a {type(built).__name__} was given; give a transform, a mapping with "
            f"_target_, or a list of these"
        )
    return built  # type: ignore[no-any-return]


def _class_names(root: Path, wanted: Sequence[str] | None) -> list[str]:
    if not root.is_dir():
        raise UserError(f"root: there is no folder '{root}'; give one with a sub-folder per class")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    found = [name for name in found if not name.startswith(".")]
    if not found:
        raise UserError(f"root: '{root}' has no sub-folders; images are sorted into one per class")
    for name in wanted or ():
        if name not in found:
            raise UserError(
                f"class_names: '{root}' has no sub-folder '{name}'{suggestion(name, found)}"
            )
    return found if wanted is None else list(wanted)


def _chosen(folder: Path, skip: int, per_class: int | None) -> list[str]:
    found = _image_files(folder)
    if skip >= len(found):
        raise UserError(
            f"skip: '{folder}' has {len(found)} images, and {skip} are passed over; give fewer"
        )
    return found[skip:][:per_class]


def _image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = [name for entry in entries if not (name := entry.name).startswith(".")]
    names = sorted(name for name in found if name.lower().endswith(_SUFFIXES))
    if not names:
        raise UserError(
            f"root: '{folder}' has no images ({', '.join(_SUFFIXES)}); remove the folder, or "
            f"name the classes that count"
        )
    return names


def _read_all(root: Path, names: Sequence[str], decoding: Decoding) -> Tensor:
    """Return the pixels of all files, (N, C, H, W) uint8."""
    paths = [root / name for name in names]
    first = decoding.read(paths[0])
    height, width, channels = first.shape
    pixels = np.empty((len(paths), channels, height, width), dtype=np.uint8)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        threads = paths[0].stat().st_size >= _THREADS_FROM
        images = (pool.map if threads else map)(decoding.read, paths)
        progress = tqdm(images, total=len(paths), desc=f"reading {root}", unit="img", disable=None)
        for number, image in enumerate(progress):
            if image.shape != first.shape:
                raise UserError(
                    f"image_size: '{paths[number]}' is {image.shape[1]}×{image.shape[0]}, "
                    f"'{paths[0]}' is {width}×{height}; give one image_size"
                )
            pixels[number] = image.transpose(2, 0, 1)
    return torch.from_numpy(pixels)
