"""Cosines between the task vectors of all pairs of experts, as a heatmap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusion.figures.style import PAGE_WIDTH, house_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

DIVERGING = "RdBu_r"  # red agrees, blue opposes, white in the middle; safe for the colour-blind
ABSENT = "#bdbdbd"  # cells without a number

_BAR = 0.9  # inches: the colour bar with its numbers
_LONGEST = 1.6  # inches: space for the names of experts
_LARGEST_CELL = 0.42  # inches
_ANNOTATED_CELL = 0.235  # inches: "−0.12" at the smallest legible size still fits
_SLANTED_CELL = 0.25  # inches: in narrower cells slanted labels would run into each other
_LETTER = 0.075  # inches: mean width of a letter of a tick label
_DARK = 0.6  # cosines beyond are so dark that their number is written in white


def similarity_heatmap(similarity: pd.DataFrame, *, cluster: bool = False) -> Figure:
    """Draw a symmetric matrix of cosines on a fixed scale from −1 to 1.

    The numbers are written into the cells while they stay legible (up to 22 experts). Cells
    without a number are grey.

    Args:
        similarity: experts × experts.
        cluster: order the experts so that similar ones are adjacent (``cluster_order``).
    """
    names = [str(name) for name in similarity.index]
    values = similarity.to_numpy(dtype=float)
    if cluster:
        order = cluster_order(values)
        names = [names[i] for i in order]
        values = values[np.ix_(order, order)]
    count = len(names)
    longest = min(_LETTER * max(map(len, names)), _LONGEST)
    cell = min(_LARGEST_CELL, (PAGE_WIDTH - longest - _BAR) / count)
    absent = bool(np.isnan(values).any())
    with house_style():
        side = cell * count
        slanted = cell >= _SLANTED_CELL
        height = side + (0.75 if slanted else 1.0) * longest + 0.15 + 0.25 * absent
        figure = new_figure(width=side + longest + _BAR, height=max(height, 1.5))
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.set_facecolor(ABSENT)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values),
            cmap=DIVERGING,
            vmin=-1,
            vmax=1,
            edgecolor="white",
            linewidth=0.5,
        )
        axes.set_aspect("equal")
        axes.invert_yaxis()
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_yticks(np.arange(count) + 0.5, names)
        axes.set_xticks(np.arange(count) + 0.5, names)
        if longest > cell:
            axes.tick_params(axis="x", rotation=45 if slanted else 90)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right" if slanted else "center")
                label.set_rotation_mode("anchor" if slanted else "default")
        if cell >= _ANNOTATED_CELL:
            _annotate(axes, values, size=min(7.0, 21 * cell))
        bar = figure.colorbar(mesh, ax=axes, ticks=[-1, -0.5, 0, 0.5, 1], aspect=15, pad=0.03)
        bar.set_label("cosine")
        bar.outline.set_visible(False)
        if absent:
            grey = Patch(color=ABSENT, label="not changed from the base")
            figure.legend(handles=[grey], loc="outside upper left")
    return figure


def cluster_order(similarity: NDArray[np.float64]) -> list[int]:
    """Return the order of the leaves of an average-linkage tree on the distances 1 − cosine.

    Of all orders of that tree it is the one that puts the most similar neighbours side by side
    (Bar-Joseph et al., 2001). Rows without numbers come last.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    known = np.flatnonzero(~np.isnan(np.diagonal(similarity)))
    unknown = np.flatnonzero(np.isnan(np.diagonal(similarity)))
    if len(known) > 2:  # two leaves have one order
        distances = 1 - similarity[np.ix_(known, known)]
        condensed = squareform(distances, checks=False)
        known = known[leaves_list(linkage(condensed, method="average", optimal_ordering=True))]
    return [*known.tolist(), *unknown.tolist()]


def _annotate(axes: Axes, values: NDArray[np.float64], *, size: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.2f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=size,
                color="white" if abs(value) > _DARK else "black",
            )
