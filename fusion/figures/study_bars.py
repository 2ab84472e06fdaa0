"""One figure of every merge of a study as bars, a bar for each fine-tuning, against a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusion.figures.study_style import finetuning_order, finetuning_style
from fusion.figures.style import house_style, new_figure

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 4.6  # inches
_BAR = 0.115  # inches: the height of a bar that a number of six points fits beside
_GAP = 0.07  # inches between two merges
_FRAME = 1.0  # inches: legend and axis
_VALUE_SIZE = 6  # points


def study_bars(
    table: pd.DataFrame,
    column: str,
    *,
    label: str,
    scale: float = 1.0,
    digits: int = 1,
    baseline: float | None = None,
) -> Figure:
    """Draw ``column`` as bars that lie, grouped by merge, with the values beside them.

    Bars lie because names are long. They start at 0, as bars must: what differs little is read
    from the numbers, or drawn as a change.

    Args:
        table: a row a bar with the columns ``name`` (of the merge), ``strategy`` (of the
            fine-tuning), ``column`` and, for several seeds, ``<column>_error``. Rows without a
            number are left out.
        column: what is drawn.
        label: of the axis, with the unit.
        scale: factor of the numbers.
        digits: after the point.
        baseline: the number of the baseline, drawn as a line across all merges.

    Raises:
        ValueError: no row has a number.
    """
    table = table[table[column].notna()]
    if table.empty:
        raise ValueError(f"no row of the table has a number in '{column}'")
    names = list(dict.fromkeys(table["name"]))
    strategies = finetuning_order(table["strategy"])
    pitch = _BAR * len(strategies) + _GAP  # inches from merge to merge
    with house_style():
        figure = new_figure(width=_WIDTH, height=pitch * len(names) + _FRAME)
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        for place, strategy in enumerate(strategies):
            _draw(axes, table, names, column, strategy, place, len(strategies), scale, digits)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(label)
        _room_for_values(axes, table[column].to_numpy(dtype=float) * scale)
        handles: list[Patch] = [
            Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=words)
            for color, words in map(finetuning_style, strategies)
        ]
        lines = []
        if baseline is not None:
            lines = [
                axes.axvline(
                    baseline * scale,
                    color="black",
                    linestyle="--",
                    linewidth=0.9,
                    zorder=3,
                    label="baseline: base, everything trained",
                )
            ]
        figure.legend(handles=[*handles, *lines], loc="outside upper center", ncols=2)
    return figure


def _draw(
    axes: Axes,
    table: pd.DataFrame,
    names: list[str],
    column: str,
    strategy: str,
    place: int,
    places: int,
    scale: float,
    digits: int,
) -> None:
    height = _BAR / (_BAR * places + _GAP)
    for _, row in table[table["strategy"] == strategy].iterrows():
        value = float(row[column]) * scale
        error = float(row.get(f"{column}_error", np.nan)) * scale
        at = names.index(row["name"]) + (place - (places - 1) / 2) * height
        axes.barh(
            at,
            value,
            height=height,
            color=finetuning_style(strategy)[0],
            edgecolor="black",
            linewidth=0.3,
            xerr=None if np.isnan(error) else error,
            error_kw={"elinewidth": 0.7, "ecolor": "#7f7f7f", "capsize": 1},
            zorder=2,
        )
        text = f"{round(value, digits) + 0.0:.{digits}f}" + (
            "" if np.isnan(error) else f" ± {error:.{digits}f}"
        )
        edge = value + (np.sign(value) or 1) * (0 if np.isnan(error) else error)
        axes.annotate(
            text,
            (edge, at),
            xytext=(2 if value >= 0 else -2, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=_VALUE_SIZE,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )


def _room_for_values(axes: Axes, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    span = (high - low) or 1.0
    axes.set_xlim(low - (0.2 * span if low < 0 else 0), high + 0.2 * span if high > 0 else 0.05)
    if low < 0:
        axes.axvline(0, color="black", linewidth=0.6, zorder=3)
