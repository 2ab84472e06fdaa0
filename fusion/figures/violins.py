"""Violins of many values, one per expert, on a shared axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion.figures.style import house_style

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_WIDTH = 4.6  # inches
_ROW, _LOW_ROW = 0.3, 0.2  # inches for each expert: for few, and for so many that a page is full
_TALL = 6.0  # inches: rows of all experts together, before they get lower
_HALF = 0.42  # half height of a violin, of the distance between two
_BINS = 1024  # of the density estimate, over the shown range
_SHOWN = 0.98  # share of all values that the axis spans; the rest is counted in the label
_FILL = "#9ecae1"
_LINE = "#08519c"


def violins(
    values: pd.DataFrame,
    drawn: str,
    *,
    absolute: bool = False,
    fig_kwargs: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw the distribution of each column as a violin, with its quartiles.

    Violins are horizontal, so that names stay legible however many there are. All have the same
    largest width. The axis spans the central 98 % of all values together (from 0 for absolute ones)
    and states the share beyond it (task vectors have heavy tails); densities and quartiles account
    for all values.

    Args:
        values: one row per point, one column per expert.
        drawn: description of the points in the subtitle.
        absolute: show absolute values.
        fig_kwargs: for ``matplotlib.pyplot.subplots``; they override this function's defaults.
    """
    from matplotlib import pyplot as plt

    names = [str(name) for name in values.columns]
    data = values.to_numpy(dtype=float)
    if absolute:
        data = np.abs(data)
    low, high = _shown_range(data, absolute=absolute)
    beyond = float(np.mean((data < low) | (data > high)))
    with house_style():
        row_height = min(_ROW, max(_LOW_ROW, _TALL / len(names)))
        options = {"figsize": (_WIDTH, row_height * len(names) + 0.95), **(fig_kwargs or {})}
        figure: Figure
        axes: Axes
        figure, axes = plt.subplots(**options)
        plt.close(figure)  # only pyplot forgets it: nothing piles up over many runs
        for row in range(len(names)):
            _violin(axes, data[:, row], row, low, high, absolute=absolute)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(low, high)
        axes.axvline(0, color="black", linewidth=0.6, zorder=1)
        axes.locator_params(axis="x", nbins=6)
        axes.ticklabel_format(axis="x", scilimits=(-3, 3), useMathText=True)
        label = "absolute value" if absolute else "value"
        outside = f"; {beyond:.1%} of the values lie beyond the axis" if beyond else ""
        axes.set_xlabel(f"{label} of the task vector's entries")
        axes.set_title(f"{drawn}\nbar: quartiles, line: median{outside}", loc="left", fontsize=7)
    return figure


def _shown_range(data: NDArray[np.float64], *, absolute: bool) -> tuple[float, float]:
    tail = (1 - _SHOWN) / 2
    if absolute:
        low, high = 0.0, float(np.quantile(data, _SHOWN))
    else:
        low, high = (float(q) for q in np.quantile(data, [tail, 1 - tail]))
    if low == high:  # nothing changed
        low, high = low - 1e-12, high + 1e-12
    return low, high


def _violin(
    axes: Axes, data: NDArray[np.float64], row: int, low: float, high: float, *, absolute: bool
) -> None:
    at, density = _density(data, low, high, reflect=absolute)
    if density.max() > 0:
        width = _HALF * density / density.max()
        axes.fill_between(at, row - width, row + width, color=_FILL, linewidth=0, zorder=2)
    first, median, third = np.quantile(data, [0.25, 0.5, 0.75])
    axes.hlines(row, first, third, color=_LINE, linewidth=2.5, zorder=3)
    axes.vlines(median, row - 0.2, row + 0.2, color=_LINE, linewidth=1.0, zorder=4)


def _density(
    data: NDArray[np.float64], low: float, high: float, *, reflect: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimate the density on a grid with a Gaussian kernel, in time linear in the points.

    The bandwidth is Silverman's (1986, eq. 3.31): with the quartiles in place of the standard
    deviation where the tails are heavy. With ``reflect`` nothing leaks below 0.
    """
    spread = min(float(data.std()), float(np.subtract(*np.quantile(data, [0.75, 0.25]))) / 1.34)
    step = (high - low) / _BINS
    bandwidth = max(0.9 * (spread or float(data.std())) * len(data) ** -0.2, step)
    margin = int(np.ceil(4 * bandwidth / step))  # values just beyond the axis contribute to it
    counts, edges = np.histogram(
        data, bins=_BINS + 2 * margin, range=(low - margin * step, high + margin * step)
    )
    offsets = step * np.arange(-margin, margin + 1)
    kernel = np.exp(-0.5 * (offsets / bandwidth) ** 2)
    density = np.convolve(counts, kernel, mode="same")
    at = (edges[:-1] + edges[1:]) / 2
    if reflect:
        density[margin : 2 * margin] += density[:margin][::-1]
    inside = slice(margin, -margin)
    return at[inside], density[inside]
