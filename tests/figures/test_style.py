from __future__ import annotations

import itertools
import subprocess
import sys

import matplotlib
import pytest
from matplotlib.figure import Figure

from fusion.figures.style import COLORS, house_style, new_figure, palette, save_figure


def drawn() -> Figure:
    with house_style():
        figure = new_figure()
        axes = figure.add_subplot()
        axes.plot([1.0, 2.0, 1.5])
        axes.set_title("signal-to-noise ratio")
    return figure


def luminance(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_both_files_are_written_and_nothing_else(tmp_path):
    pdf, png = save_figure(drawn(), tmp_path / "new" / "folder", "layers")
    assert sorted(pdf.parent.iterdir()) == [pdf, png]
    assert (pdf.name, png.name) == ("layers.pdf", "layers.png")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_fonts_are_embedded_as_truetype(tmp_path):
    pdf, _ = save_figure(drawn(), tmp_path, "layers")
    assert b"/FontFile2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()


def test_the_same_figure_gives_the_same_files(tmp_path):
    first = [path.read_bytes() for path in save_figure(drawn(), tmp_path, "a")]
    second = [path.read_bytes() for path in save_figure(drawn(), tmp_path, "b")]
    assert first == second


def test_a_failed_save_leaves_the_old_files_alone(tmp_path):
    pdf, png = save_figure(drawn(), tmp_path, "layers")
    before = pdf.read_bytes(), png.read_bytes()
    broken = drawn()
    with house_style():
        broken.axes[0].set_xlabel(r"$\frac{1}$")  # matplotlib refuses this when it draws
    with pytest.raises(ValueError):
        save_figure(broken, tmp_path, "layers")
    assert (pdf.read_bytes(), png.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [pdf, png]


def test_the_style_ends_with_its_block():
    before = dict(matplotlib.rcParams)
    with house_style():
        assert dict(matplotlib.rcParams) != before
    assert dict(matplotlib.rcParams) == before


def test_thirty_members_differ_without_colour():
    styles = palette(30)
    assert len({(style.marker, style.linestyle) for style in styles}) == 30
    neighbours = itertools.pairwise(styles)
    assert all(a.color != b.color and a.linestyle != b.linestyle for a, b in neighbours)


def test_a_member_keeps_its_style_when_others_join():
    assert palette(30)[:4] == palette(4)
    assert palette(0) == ()
    with pytest.raises(ValueError, match="-1"):
        palette(-1)


def test_every_colour_stands_out_from_white_paper():
    # 1.9 is the contrast of Okabe & Ito's lightest remaining colour; their yellow has 1.2
    assert all(1.05 / (luminance(color) + 0.05) > 1.9 for color in COLORS)


def test_drawing_needs_no_pyplot():
    code = "import sys, fusion.figures.style; print('matplotlib.pyplot' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
