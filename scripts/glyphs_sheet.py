"""Draw the contact sheet of ``fusion.data.glyphs``: six images of each character.

python scripts/glyphs_sheet.py --out docs/_static/glyphs.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from fusion.data import glyphs
from fusion.data.glyphs import Script

_LEVELS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/_static/glyphs.png"))
    parser.add_argument("--columns", type=int, default=6, help="images of each character")
    arguments = parser.parse_args()
    scripts = get_args(Script)
    figure, axes = plt.subplots(2, len(scripts) // 2, figsize=(11, 8), layout="constrained")
    for axis, script in zip(axes.flat, scripts, strict=True):
        images = glyphs(script, "test", per_class=arguments.columns)
        rows = images.images.numpy().reshape(images.num_classes, arguments.columns, 28, 28)
        padded = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
        sheet = padded.transpose(0, 2, 1, 3).reshape(30 * images.num_classes, -1)
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        axis.set_title(script, fontsize=11)
        axis.axis("off")
    figure.savefig(arguments.out, dpi=72)
    with Image.open(arguments.out) as drawn:
        few = drawn.convert("L").quantize(_LEVELS)  # noise does not compress: a third of the bytes
    few.save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
