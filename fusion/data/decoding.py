"""Decoding of image files: orientation, resizing, centre crop."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fusion.errors import UserError, suggestion

# A torchvision transform of training images, as typed here.
FileTransform = Callable[[Image.Image], Image.Image | Tensor]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {method.name.lower(): method for method in Image.Resampling}
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if that leaves this many times the size
# requested, so that the resampling filter still sees detail that it must remove. 2 is what Pillow
# uses for thumbnails; the difference to full decoding is measured in tests/data/test_decoding.py.
_DRAFT_GAP = 2
_ORIENTATION = 0x0112  # number of the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that exchange width and height
# Exceptions of Pillow for files that are damaged, truncated, malicious or not images.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Decoding:
    """Options of reading image files.

    Files are turned upright as their EXIF orientation says, and converted to grey or RGB of
    eight bits.

    Args:
        channels: 3 reads colour, 1 grey.
        image_size: side in pixels of the square taken from the middle; None leaves images whole.
        resize: pixels that the shorter side is scaled to before the crop, as torchvision's
            ``Resize`` and ``CenterCrop`` do, bit for bit; None takes the largest square and
            scales it to ``image_size``.
        interpolation: Pillow's name of the resampling filter, which widens when an image shrinks
            (what torchvision calls antialias).
        draft: decode large JPEG files at a half, a quarter or an eighth of their size where twice
            the requested size remains; several times faster, and off by less than one grey level
            in 255 on average.

    Raises:
        UserError: an impossible option.
    """

    channels: int = 3
    image_size: int | None = None
    resize: int | None = None
    interpolation: str = "bilinear"
    draft: bool = False

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise UserError(f"channels: {self.channels} were given; images are read with 1 or 3")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size: {self.image_size} was given; give 1 or more, or none")
        if self.interpolation not in _FILTERS:
            raise UserError(
                f"interpolation: there is no '{self.interpolation}'"
                f"{suggestion(self.interpolation, _FILTERS)} (there are {', '.join(_FILTERS)})"
            )
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise UserError(
                f"resize: the shorter side becomes {self.resize} pixels before the middle "
                f"{self.image_size} are cropped; give image_size, and a resize not below it"
            )

    def read(self, path: str | Path) -> NDArray[np.uint8]:
        """Return the pixels of one file, (H, W, C).

        Raises:
            UserError: it cannot be read as an image.
        """
        try:
            with Image.open(path) as file:
                size = file.size
                box: Box = (0.0, 0.0, float(size[0]), float(size[1]))
                if self.draft and self.image_size is not None:
                    side = _DRAFT_GAP * (self.resize or self.image_size)
                    drafted = file.draft(None, (side, side))
                    box = box if drafted is None else drafted[1]
                orientation = _orientation(file)
                box = _upright_box(box, file.size, orientation)
                image = self._upright(file)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
        size = size[::-1] if orientation in _SIDEWAYS else size
        # A copy, because torch takes no read-only array.
        return np.atleast_3d(np.array(self._sized(image, size, box), dtype=np.uint8))

    def open(self, path: str | Path) -> Image.Image:
        """Return one file upright and in its mode, at its full size.

        Raises:
            UserError: it cannot be read as an image.
        """
        try:
            with Image.open(path) as file:
                return self._upright(file)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error

    def shape(self, path: str | Path) -> tuple[int, int, int]:
        """Return channels, height and width of the result of :meth:`read`, without decoding.

        Raises:
            UserError: it cannot be read as an image.
        """
        if self.image_size is not None:
            return self.channels, self.image_size, self.image_size
        try:
            with Image.open(path) as file:
                width, height = file.size
                if _orientation(file) in _SIDEWAYS:
                    width, height = height, width
                return self.channels, height, width
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error

    def _upright(self, file: Image.Image) -> Image.Image:
        file.load()
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are of kind {file.mode}; save it with 8 bits per channel")
        ImageOps.exif_transpose(file, in_place=True)
        mode = _MODES[self.channels]
        return file if file.mode == mode else file.convert(mode)

    def _sized(self, image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
        """Resize and crop ``image``, whose part in ``box`` shows a file of ``size``."""
        if self.image_size is None:
            return image
        method = _FILTERS[self.interpolation]
        if self.resize is None:
            side = min(size)
            left, top = (size[0] - side) / 2, (size[1] - side) / 2
            across, down = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
            square = (
                box[0] + left * across,
                box[1] + top * down,
                box[0] + (left + side) * across,
                box[1] + (top + side) * down,
            )
            return image.resize((self.image_size, self.image_size), method, box=square)
        # torchvision rounds the longer side down, and the corner to the nearest even number.
        width, height = (
            self.resize if side == min(size) else int(self.resize * side / min(size))
            for side in size
        )
        left, top = round((width - self.image_size) / 2), round((height - self.image_size) / 2)
        crop = (left, top, left + self.image_size, top + self.image_size)
        return image.resize((width, height), method, box=box).crop(crop)


def _orientation(file: Image.Image) -> int:
    return int(file.getexif().get(_ORIENTATION, 1))


def _upright_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return where ``box``, from the corner of an image of ``size``, is once that is upright.

    A draft whose sides are not multiples of 8 has a surplus fraction of a pixel at its right and
    bottom edges; scaled with the rest, it would shift the image.
    """
    width, height = size
    _, _, right, bottom = box
    across = (width - right, float(width)) if orientation in (2, 3, 7, 8) else (0.0, right)
    down = (height - bottom, float(height)) if orientation in (3, 4, 6, 7) else (0.0, bottom)
    if orientation in _SIDEWAYS:
        across, down = down, across
    return across[0], down[0], across[1], down[1]


def _unreadable(path: str | Path, error: BaseException) -> UserError:
    return UserError(f"root: '{path}' cannot be read as an image ({error})")
