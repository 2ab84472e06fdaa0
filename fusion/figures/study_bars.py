"""Bars of one figure for every merge and fine-tuning of a study, against a baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fusion.figures.study_style import finetuning_order, finetuning_style
from fusion.figures.style import house_style, new_figure

_WIDTH = 4.6  # inches
_BAR = 0.115  # inches: the height of a bar next to which a number of six points fits
_GAP = 0.07  # inches between two merges
_ROOM = 0.16  # of the axis: what a number takes
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
    """Draw ``column`` as horizontal bars, grouped by merge, with the values next to them.

    Bars are horizontal because names are long. They start at 0. Small differences can be read from
    the numbers, or drawn as a change.

    Args:
        table: one row per bar with the columns ``name`` (of the merge), ``strategy`` (of the
            fine-tuning), ``column`` and, for several seeds, ``<column>_error``. Rows without a
            number are omitted.
        column: the column to draw.
        label: of the axis, with the unit.
        scale: factor of the numbers.
        digits: after the point.
        baseline: the number of the baseline, drawn as a line across all merges.

    Raises:
        ValueError: no row has a number.
    """
    errors = f"{column}_error"
    bars = pd.DataFrame(
        {
            "name": table["name"],
            "strategy": table["strategy"],
            "value": table[column] * scale,
            "error": table[errors] * scale if errors in table else np.nan,
        }
    ).dropna(subset="value")
    if bars.empty:
        raise ValueError(f"no row of the table has a number in '{column}'")
    line = None if baseline is None else baseline * scale
    names = list(dict.fromkeys(bars["name"]))
    strategies = finetuning_order(bars["strategy"])
    pitch = _BAR * len(strategies) + _GAP  # inches from merge to merge
    bars["at"] = [
        names.index(name) + (strategies.index(strategy) - (len(strategies) - 1) / 2) * _BAR / pitch
        for name, strategy in zip(bars["name"], bars["strategy"], strict=True)
    ]
    with house_style():
        figure = new_figure(width=_WIDTH, height=pitch * len(names) + _FRAME)
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        for strategy in strategies:
            rows = bars[bars["strategy"] == strategy]
            axes.barh(
                rows["at"],
                rows["value"],
                height=_BAR / pitch,
                color=finetuning_style(strategy)[0],
                edgecolor="black",
                linewidth=0.3,
                xerr=rows["error"].fillna(0) if rows["error"].notna().any() else None,
                error_kw={"elinewidth": 0.7, "ecolor": "#7f7f7f"},
                zorder=2,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(label)
        _make_room(axes, bars["value"], bars["error"])
        _write_values(axes, bars, line, digits)
        handles: list[Patch | Line2D] = [
            Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=f"{words} trained")
            for color, words in map(finetuning_style, strategies)
        ]
        if line is not None:
            name = "baseline: base, everything trained"
            style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 0.9}
            handles.append(axes.axvline(line, zorder=3, label=name, **style))
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _make_room(axes: Axes, values: pd.Series[float], errors: pd.Series[float]) -> None:
    """Leave space for the numbers next to the bars."""
    reach = errors.fillna(0.0)
    low, high = min(0.0, float((values - reach).min())), max(0.0, float((values + reach).max()))
    room = _ROOM * ((high - low) or 1.0) * (2 if errors.notna().any() else 1)
    axes.set_xlim(low - room if low < 0 else 0, high + room)
    if low < 0:
        axes.axvline(0, color="black", linewidth=0.6, zorder=3)


def _write_values(axes: Axes, bars: pd.DataFrame, line: float | None, digits: int) -> None:
    low, high = axes.get_xlim()
    for value, error, at in zip(bars["value"], bars["error"], bars["at"], strict=True):
        text = f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
        end = value
        if not np.isnan(error):
            text += f" ± {error:.{digits}f}"
            end += error if value >= 0 else -error
        if line is not None and 0 <= line - end < _ROOM * (high - low):
            end = line  # not across the baseline
        axes.annotate(
            text,
            (end, at),
            xytext=(2 if value >= 0 else -2, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=_VALUE_SIZE,
            zorder=5,
        )
