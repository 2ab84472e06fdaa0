"""Style of all figures: paper-sized, readable in greyscale and by the colour-blind.

Figures are made without ``pyplot`` and its global state, so they can be drawn in any thread and on
a machine without a display::

    with house_style():
        figure = new_figure(height=2.4)
        axes = figure.add_subplot()
        for values, member in zip(series, palette(len(series))):
            axes.plot(values, color=member.color, marker=member.marker, linestyle=member.linestyle)
    save_figure(figure, "outputs", "layers")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusion.files import atomic_path

COLUMN_WIDTH = 3.4  # inches: one column of a two-column paper
PAGE_WIDTH = 7.0  # inches: both columns and the gap between them
PNG_DPI = 200  # sharp on a screen and in a README, still a small file

# Okabe & Ito (2008), the order changed so that neighbours differ most; their yellow is left out
# because a thin yellow line on white paper cannot be seen.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINESTYLES = ("-", "--", "-.", ":")

_GRID = "#d9d9d9"
_INK = "#262626"
# Keys are `Any`: recent matplotlib types them as a closed list of names, older ones as `str`.
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "axes.edgecolor": _GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "patch.linewidth": 0.5,
    "figure.constrained_layout.use": True,
    "image.cmap": "viridis",  # even in lightness: survives greyscale
}
_EMBED_FONTS: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType: text stays text, and journals refuse matplotlib's Type 3
    "ps.fonttype": 42,
}


@dataclass(frozen=True)
class MemberStyle:
    """Line style of one member of a pool, in matplotlib's terms."""

    color: str
    marker: str
    linestyle: str


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style of this package within the block, then restore the caller's settings."""
    with matplotlib.rc_context({**_STYLE, **_EMBED_FONTS}):
        yield


def new_figure(*, width: float = COLUMN_WIDTH, height: float = 2.4) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches, outside of any global state."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def palette(n: int) -> tuple[MemberStyle, ...]:
    """Return ``n`` styles, the first (black, solid) for the base.

    Colours, markers and line styles repeat with periods 7, 9 and 4. No two of the first 36 share
    marker *and* line style, so that up to there the members differ without colour.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"a palette needs a number of members of at least 0, got {n}")
    return tuple(
        MemberStyle(
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINESTYLES[i % len(LINESTYLES)],
        )
        for i in range(n)
    )


def save_figure(figure: Figure, folder: str | Path, stem: str) -> tuple[Path, Path]:
    """Write ``figure`` as ``<stem>.pdf`` and ``<stem>.png`` into ``folder``; return both paths.

    Each file appears whole or not at all. The PDF embeds its fonts as TrueType and carries no
    date, so that the same figure gives the same file.
    """
    pdf = Path(folder) / f"{stem}.pdf"
    png = Path(folder) / f"{stem}.png"
    with matplotlib.rc_context(_EMBED_FONTS):
        with atomic_path(pdf) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        with atomic_path(png) as temporary:
            figure.savefig(temporary, format="png", dpi=PNG_DPI)
    return pdf, png
