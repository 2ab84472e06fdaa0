"""Printed letters and signs of ten scripts, drawn from a free font: tasks without a download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fusion.data.augmentation import Augmentation
from fusion.data.image_tensors import ImageTensors
from fusion.data.labels import new_labels
from fusion.data.seeds import seed_from
from fusion.options import Count, Seed, checked

Script = Literal[
    "latin",
    "greek",
    "cyrillic",
    "armenian",
    "georgian",
    "hebrew",
    "arabic",
    "mathematics",
    "arrows",
    "digits",
]

_PER_CLASS = {"train": 500, "val": 50, "test": 25}
_SIDE = 28  # pixels of an image
_FINE = 2 * _SIDE  # glyphs are placed on a grid twice as fine, then averaged
_MARGIN = 4  # around a template, so that its edge is interpolated with black
_EM = 64  # pixels of the em square that templates are drawn with
_STROKES = (0, 1, 2)  # template pixels added around a glyph
_MEAN, _STD = 0.25, 0.21  # roughly of the pixels of any script, on the scale 0..1
_KEPT = 32  # sets of pixels kept in memory: up to 4 MB each at 500 images per class

_UPRIGHT = ("DejaVuSans", "DejaVuSans-Bold")
_SLANTED = ("DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
_MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold")
_SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic")
_ALL = (*_UPRIGHT, *_SLANTED, *_MONO, *_SERIF)

# Ten characters of each script that differ in more than a serif, and the faces that have them.
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "latin": ("ABEGHKMRSW", _ALL),
    "greek": ("ΓΔΘΛΞΠΣΦΨΩ", _ALL),
    "cyrillic": ("БДЖИФЦЧШЭЮ", _ALL),
    "armenian": ("ԱԲԳԷԺԽՀՁՊՖ", _ALL),
    "georgian": ("აბგდვთკლრფ", _ALL),
    "hebrew": ("אבגוטלמצקש", (*_UPRIGHT, *_SLANTED)),
    "arabic": ("ابجدسصعقكه", (*_UPRIGHT, *_MONO)),  # isolated forms
    "mathematics": ("∀∂∃∇∈√∞∩∫≈", _ALL),
    "arrows": ("←↑→↓↔↕↖↗↘↙", _ALL),
    "digits": ("0123456789", _ALL),
}


@dataclass(frozen=True)
class _Range:
    """The range from which a property of an image is drawn uniformly."""

    least: float
    most: float

    def draw(self, random: np.random.Generator) -> float:
        return float(random.uniform(self.least, self.most))


_LENGTH = _Range(13, 22)  # longer side of the glyph in pixels
_ASPECT = _Range(0.8, 1.25)  # stretch of the width against the height
_ANGLE = _Range(-15, 15)  # degrees
_SHIFT = _Range(-3, 3)  # pixels, in each direction
_PAPER = _Range(0, 0.35)  # brightness around the glyph
_CONTRAST = _Range(0.3, 0.65)  # how much brighter the glyph is
_NOISE = _Range(0.02, 0.2)  # standard deviation of each pixel's noise


@checked
def glyphs(
    script: Script,
    split: Literal["train", "val", "test"] = "train",
    *,
    seed: Seed = 0,
    per_class: Count | None = None,
) -> ImageTensors:
    """Draw 28×28 grey images of ten characters of a script, bright on dark.

    Size, aspect, position, angle, stroke width, font face, brightness, contrast and noise are
    random. An image depends on the seed, the script, the split, the character and its number
    within the class alone: a larger ``per_class`` extends a smaller one, and the splits are drawn
    independently, so that no image is in two of them. The same call gives the same images with
    the same version of Pillow, whose FreeType draws the outlines.

    The characters are drawn from the DejaVu fonts that come with matplotlib. Their licence (that
    of Bitstream Vera, with changes in the public domain) allows any use of the fonts, and images
    made with them.

    Augmentation, when requested, shifts by two pixels at most and does not flip.

    Args:
        script: which characters.
        split: which part.
        seed: of everything that is random.
        per_class: number of images of each character; by default 500 for training, 50 for
            validation and 25 for tests.

    Raises:
        UserError: an unknown script or split.
    """
    characters, _ = SCRIPTS[script]
    count = per_class or _PER_CLASS[split]
    pixels = _drawn(script, split, seed, count)
    return ImageTensors(
        torch.from_numpy(pixels.copy()).unsqueeze(1),
        torch.arange(len(characters)).repeat_interleave(count),
        class_names=list(characters),
        original_labels=new_labels(list(characters)),
        mean=[_MEAN],
        std=[_STD],
        augmentation=Augmentation(padding=2, flip=False),
    )


@lru_cache(_KEPT)
def _drawn(script: str, split: str, seed: int, count: int) -> np.ndarray:
    """Return the pixels, (classes * count, 28, 28) uint8, ordered by class and number."""
    characters, faces = SCRIPTS[script]
    total = len(characters) * count
    fine = np.empty((total, _FINE, _FINE), np.uint8)
    noise = np.empty((total, _SIDE, _SIDE), np.float32)
    levels = np.empty((3, total, 1, 1), np.float32)
    for row in range(total):
        label, number = divmod(row, count)
        random = np.random.default_rng(seed_from(seed, "glyphs", script, split, label, number))
        face = faces[random.integers(len(faces))]
        stroke = _STROKES[random.integers(len(_STROKES))]
        fine[row] = np.asarray(_placed(_template(characters[label], face, stroke), random))
        levels[:, row, 0, 0] = [r.draw(random) for r in (_PAPER, _CONTRAST, _NOISE)]
        random.standard_normal(out=noise[row], dtype=np.float32)
    ink = fine.reshape(total, _SIDE, 2, _SIDE, 2).mean((2, 4), dtype=np.float32) / 255
    paper, contrast, deviation = levels
    bright = paper + contrast * ink + deviation * noise
    pixels: np.ndarray = np.rint(bright.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _placed(template: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return a template on the fine grid, at a random size, aspect, angle and position."""
    width, height = (side - 2 * _MARGIN for side in template.size)
    aspect = _ASPECT.draw(random) ** 0.5
    scale = 2 * _LENGTH.draw(random) / max(width * aspect, height / aspect)
    angle = np.deg2rad(_ANGLE.draw(random))
    across, down = 2 * _SHIFT.draw(random), 2 * _SHIFT.draw(random)
    # Pillow asks for the way back: where in the template a pixel of the grid comes from.
    back_x, back_y = 1 / (scale * aspect), aspect / scale
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, d, e = cos * back_x, sin * back_x, -sin * back_y, cos * back_y
    x, y = _FINE / 2 + across, _FINE / 2 + down
    c = template.width / 2 - a * x - b * y
    f = template.height / 2 - d * x - e * y
    return template.transform(
        (_FINE, _FINE),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
    )


@lru_cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(
        str(folder / f"{face}.ttf"), _EM, layout_engine=ImageFont.Layout.BASIC
    )


@lru_cache(None)  # at most 2,280 of them, 8 MB
def _template(character: str, face: str, stroke: int) -> Image.Image:
    """Return a character in white on black with a margin, cut to its ink."""
    image = Image.new("L", (3 * _EM, 3 * _EM))
    ImageDraw.Draw(image).text(
        (_EM, _EM), character, fill=255, font=_font(face), stroke_width=stroke
    )
    left, top, right, bottom = image.getbbox() or (0, 0, 1, 1)
    return image.crop((left - _MARGIN, top - _MARGIN, right + _MARGIN, bottom + _MARGIN))
