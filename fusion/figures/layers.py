"""The signal-to-noise ratio of every layer in forward order, the selected layers marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusion.figures.style import COLUMN_WIDTH, PAGE_WIDTH, house_style, new_figure, palette

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

SNR_PREFIX = "snr/"  # the columns of the members: "snr/<member>", the base's first

_MAX_LINES = 7  # members drawn one by one; more become the base and the range of the experts
_MAX_MARKED_LAYERS = 40  # beyond, markers would touch and the lines are drawn alone
_MAX_LAYERS_IN_COLUMN = 12
_NAME_SIZE = 6  # points
_NAME_GAP = 0.105  # inches from one upright name to the next that keep them apart
_MAX_NAME = 30  # characters; of a longer name the end is shown, which distinguishes layers
_LOG_RATIO = 30.0  # where values span more than this factor, a linear axis hides the small ones
_SELECTED = "#fbe3b5"  # light enough for black lines on top, grey enough to survive greyscale
_OTHER_NAME = "#7f7f7f"


def layer_snr_figure(table: pd.DataFrame) -> Figure:
    """Draw the SNR of each layer for each member of the pool.

    Up to seven members get a line each; of more, the base keeps its line and the experts are shown
    by mean and range. The axis is linear where the values allow it, else logarithmic down to the
    smallest positive value and linear from there to zero, so that layers without signal appear at
    zero. Names that would overlap are omitted, those of selected layers last.

    Args:
        table: one row per layer with the columns ``layer`` (name), ``position`` (order of the
            forward pass), ``selected`` (whether the layer was merged), ``rank`` (1 is the best
            score; nan where there is none) and ``snr/<member>`` for each member, the base first. A
            member without a number for a layer has nan there, and a gap in its line.

    Raises:
        ValueError: a column is missing, or there is no layer.
    """
    missing = [name for name in ("layer", "position", "selected", "rank") if name not in table]
    columns = [str(name) for name in table.columns if str(name).startswith(SNR_PREFIX)]
    if not columns:
        missing.append(f"{SNR_PREFIX}…")
    if missing:
        raise ValueError(f"the table lacks {', '.join(missing)}")
    if table.empty:
        raise ValueError("the table has no layer")
    table = table.sort_values("position")
    members = [name.removeprefix(SNR_PREFIX).strip("_") for name in columns]
    values = table[columns].to_numpy(dtype=float).T
    selected = table["selected"].to_numpy(dtype=bool)

    with house_style():
        width = COLUMN_WIDTH if len(table) <= _MAX_LAYERS_IN_COLUMN else PAGE_WIDTH
        figure = new_figure(width=width, height=2.9)
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")
        for position in np.flatnonzero(selected):
            axes.axvspan(position - 0.5, position + 0.5, color=_SELECTED, linewidth=0, zorder=0)
        if len(members) <= _MAX_LINES:
            _draw_lines(axes, members, values)
        else:
            _draw_range(axes, members[0], values)
        _scale(axes, values)
        _name_layers(axes, table, width)
        handles, _ = axes.get_legend_handles_labels()
        if selected.any():
            handles.append(Patch(color=_SELECTED, label="selected"))
        columns_of_legend = min(len(handles), 3 if width == COLUMN_WIDTH else 8)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns_of_legend)
    return figure


def _draw_lines(axes: Axes, members: Sequence[str], values: NDArray[np.float64]) -> None:
    marked = values.shape[1] <= _MAX_MARKED_LAYERS
    for member, series, style in zip(members, values, palette(len(members)), strict=True):
        axes.plot(
            series,
            label=member,
            color=style.color,
            linestyle=style.linestyle,
            linewidth=0.9,
            marker=style.marker if marked or values.shape[1] == 1 else "",
        )


def _draw_range(axes: Axes, base: str, values: NDArray[np.float64]) -> None:
    base_style, expert_style = palette(2)
    experts = np.ma.masked_invalid(values[1:])
    positions = np.arange(values.shape[1])
    low, high = experts.min(axis=0), experts.max(axis=0)
    axes.fill_between(
        positions, low, high, color=expert_style.color, alpha=0.25, linewidth=0, zorder=1
    )
    for label, series, style in (
        (base, values[0], base_style),
        (f"{len(experts)} experts: mean, range", experts.mean(axis=0), expert_style),
    ):
        axes.plot(
            positions,
            series,
            label=label,
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker if len(positions) <= _MAX_MARKED_LAYERS else "",
        )


def _scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Choose a linear axis, or one that is logarithmic above the smallest positive value."""
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and positive.max() > _LOG_RATIO * np.median(positive):
        smallest = 10.0 ** math.floor(math.log10(positive.min()))
        axes.set_yscale("symlog", linthresh=smallest, linscale=0.5)
        axes.set_ylabel(f"SNR (logarithmic above {smallest:g})")
    else:
        axes.set_ylabel("signal-to-noise ratio")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.05)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)


def _name_layers(axes: Axes, table: pd.DataFrame, width: float) -> None:
    """Write upright names under the axis: the selected first, then others where there is space."""
    names = [str(name) for name in table["layer"]]
    selected = table["selected"].to_numpy(dtype=bool)
    rank = table["rank"].to_numpy(dtype=float)
    gap = _NAME_GAP / (0.9 * width / len(names))  # in layers; the axes take about 0.9 of the width
    order = sorted(range(len(names)), key=lambda i: (not selected[i], np.nan_to_num(rank[i])))
    if gap > 1:  # not all fit: fill up with evenly spaced ones rather than with the next best
        step = math.ceil(gap)
        order = [i for i in order if selected[i]] + list(range(0, len(names), step))
    shown: list[int] = []
    for i in order:
        if all(abs(i - other) >= gap for other in shown):
            shown.append(i)
    shown.sort()
    labels = [n if len(n) <= _MAX_NAME else f"…{n[1 - _MAX_NAME :]}" for n in names]
    axes.set_xticks(shown, [labels[i] for i in shown], rotation=90, fontsize=_NAME_SIZE)
    for i, text in zip(shown, axes.get_xticklabels(), strict=True):
        if not selected[i]:
            text.set_color(_OTHER_NAME)
    axes.set_xlabel(f"layer, in the order of the forward pass ({len(names)})")
