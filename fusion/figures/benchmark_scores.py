"""Scores of all methods in one setting as points with errors, grouped by requirement."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fusion.figures.benchmark_style import (
    CONTROL_COLOR,
    CONTROL_LINES,
    need_handles,
    need_style,
    needs_in_order,
)
from fusion.figures.style import house_style, new_figure

_WIDTH = 5.2  # inches: on a phone still legible
_ROW = 0.165  # inches: a line of seven points
_GAP = 0.6  # rows between two groups
_FRAME = 0.6  # inches: axis and its label
_LEGEND_ROW = 0.15  # inches
_FAR = 0.3  # of the methods' range: a control farther below is stated and not drawn


def benchmark_scores(table: pd.DataFrame, controls: Mapping[str, float]) -> Figure:
    """Draw the score of every method with its standard error; controls are lines.

    Within a group the best comes first. A hollow point is the same method with its defaults.

    Args:
        table: a row per method with the columns ``name``, ``group`` (what it needs), ``score``,
            ``error`` (missing for one seed) and ``defaults`` (a score; missing where it is the
            same).
        controls: name → score.

    Raises:
        ValueError: no row has a score.
    """
    table = table.dropna(subset="score")
    if table.empty:
        raise ValueError("no row of the table has a score")
    places: dict[str, float] = {}
    at = 0.0
    for need in needs_in_order(table["group"]):
        for name in table[table["group"] == need].sort_values("score", ascending=False)["name"]:
            places[name] = at
            at += 1
        at += _GAP
    bottom = at - _GAP
    entries = table["group"].nunique() + len(controls) + 1
    with house_style():
        height = _ROW * bottom + _FRAME + _LEGEND_ROW * -(-entries // 2)
        figure = new_figure(width=_WIDTH, height=max(height, 1.6))
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        for _, row in table.iterrows():
            style = need_style(str(row["group"]))
            y = places[str(row["name"])]
            if pd.notna(row["defaults"]):
                axes.plot(row["defaults"], y, marker=style.marker, color=style.color,
                          markerfacecolor="white", markersize=4, zorder=3)  # fmt: skip
            axes.errorbar(row["score"], y, xerr=row["error"] if pd.notna(row["error"]) else None,
                          marker=style.marker, color=style.color, markersize=4, elinewidth=0.9,
                          zorder=4)  # fmt: skip
            text = f"{row['score']:.1f}"
            text += f" ± {row['error']:.1f}" if pd.notna(row["error"]) else ""
            axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize=6.5, annotation_clip=False)  # fmt: skip
        axes.set_yticks(list(places.values()), list(places))
        axes.set_ylim(bottom - 0.4, -0.6)
        axes.set_xlabel("score (% of the experts' accuracy)")
        handles = need_handles(table["group"])
        if table["defaults"].notna().any():
            handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white",
                                  linestyle="none", label="hollow: with its defaults"))  # fmt: skip
        handles += _controls(axes, controls, table)
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _controls(axes: Axes, controls: Mapping[str, float], table: pd.DataFrame) -> list[Line2D]:
    """Draw the controls as lines, except those that would compress the scale of the methods."""
    low = min(table["score"].min(), table["defaults"].min())
    high = max([table["score"].max(), *controls.values()])
    least = low - _FAR * (high - low)
    handles = []
    for number, (name, score) in enumerate(controls.items()):
        label, line = f"{name}: {score:.1f}", CONTROL_LINES[number % len(CONTROL_LINES)]
        drawn = score >= least
        if drawn:
            axes.axvline(score, color=CONTROL_COLOR, linestyle=line, linewidth=0.9, zorder=1)
        else:
            label = f"{label}, left of the axis"
        handles.append(
            Line2D([], [], color=CONTROL_COLOR, linestyle=line if drawn else "none", label=label)
        )
    return handles
