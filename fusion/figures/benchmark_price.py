"""Scores against cost: multiply-adds of an answer, and the data used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fusion.figures.benchmark_style import (
    CONTROL_COLOR,
    need_style,
    needs_in_order,
)
from fusion.figures.style import house_style, new_figure

_WIDTH = 5.2  # inches: on a phone still legible
_PLOT = 2.8  # inches: height of the axes
_LEGEND_ROW = 0.15  # inches
_SPREAD = 0.76  # of the width of a column: its needs and conditions side by side
_CONDITIONS = ("o", "D", "^", "s", "X", "v", "P")


def scores_against_multiply_adds(table: pd.DataFrame, controls: pd.DataFrame) -> Figure:
    """Draw every condition's score against the multiply-adds of answering all tasks.

    Args:
        table: a row per method and condition with the columns ``name``, ``group`` (what the method
            needs), ``condition`` (the marker), ``score`` and ``multiply_adds`` in multiples of one
            network.
        controls: ``name``, ``score`` and ``multiply_adds``, drawn as crosses with their names.

    Raises:
        ValueError: no row has both numbers.
    """
    table = table.dropna(subset=["score", "multiply_adds"])
    if table.empty:
        raise ValueError("no row of the table has a score and multiply-adds")
    costs = sorted({*_rounded(table["multiply_adds"]), *_rounded(controls["multiply_adds"])})
    places = [costs.index(cost) for cost in _rounded(table["multiply_adds"])]
    others = [costs.index(cost) for cost in _rounded(controls["multiply_adds"])]
    labels = [f"{cost:g}" for cost in costs]
    label = "multiply-adds of answering all tasks (multiples of one network)"
    return _drawn(table, places, labels, label, controls.assign(place=others))


def scores_against_data(table: pd.DataFrame, kinds: Sequence[str]) -> Figure:
    """Draw every condition's score against the data that it used.

    Args:
        table: a row per method and condition with the columns ``name``, ``group`` (what the method
            needs), ``condition`` (the marker), ``score`` and ``data`` (one of ``kinds``).
        kinds: of data, the least first.

    Raises:
        ValueError: no row has a score.
    """
    table = table.dropna(subset="score")
    if table.empty:
        raise ValueError("no row of the table has a score")
    kinds = [kind for kind in kinds if kind in set(table["data"])]
    places = [kinds.index(kind) for kind in table["data"]]
    return _drawn(table, places, kinds, "data used in addition to the networks", None)


def _drawn(
    table: pd.DataFrame,
    places: Sequence[int],
    labels: Sequence[str],
    label: str,
    controls: pd.DataFrame | None,
) -> Figure:
    """Draw points in columns, one per place; needs and conditions of a column side by side."""
    needs = needs_in_order(table["group"])
    conditions = list(dict.fromkeys(table["condition"]))
    kinds = [
        needs.index(need) * len(conditions) + conditions.index(condition)
        for need, condition in zip(table["group"], table["condition"], strict=True)
    ]
    x = np.array(places, dtype=float)
    columns = [np.array(places) == place for place in sorted({*places})]
    for here in columns:
        _, slots = np.unique(np.array(kinds)[here], return_inverse=True)
        x[here] += _SPREAD * ((slots + 0.5) / (slots.max() + 1) - 0.5)
    table = table.assign(x=x).reset_index(drop=True)
    best = [int(np.argmax(np.where(here, table["score"], -np.inf))) for here in columns]
    entries = len(needs) + len(conditions) + (controls is not None and len(controls) > 0)
    with house_style():
        rows = -(-entries // 2) + len(best)
        figure = new_figure(width=_WIDTH, height=_PLOT + _LEGEND_ROW * rows + 0.3)
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="x")
        for _, row in table.iterrows():
            marker = _CONDITIONS[conditions.index(row["condition"]) % len(_CONDITIONS)]
            axes.plot(row["x"], row["score"], marker=marker, linestyle="none", markersize=4.5,
                      color=need_style(str(row["group"])).color, markeredgecolor="white",
                      markeredgewidth=0.4, zorder=3)  # fmt: skip
        for number, index in enumerate(best, start=1):
            axes.annotate(str(number), (x[index], table["score"][index]), xytext=(0, 4),
                          textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
        if controls is not None:
            _controls(axes, controls)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.margins(y=0.09)
        axes.set_xlabel(label)
        axes.set_ylabel("score (% of the experts' accuracy)")
        handles: list[Patch | Line2D] = [
            Patch(color=need_style(need).color, label=f"needs {need}") for need in needs
        ]
        handles += [
            Line2D([], [], color="black", marker=_CONDITIONS[number % len(_CONDITIONS)],
                   linestyle="none", label=condition)
            for number, condition in enumerate(conditions)
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        named = [
            Line2D(
                [], [], color="black", marker=f"${number}$", markeredgewidth=0,
                linestyle="none",
                label=f"{table['name'][index]}, {table['condition'][index]}: "
                f"{table['score'][index]:.1f}",
            )
            for number, index in enumerate(best, start=1)
        ]  # fmt: skip
        figure.legend(handles=named, loc="outside lower left", title="best of each column",
                      alignment="left", title_fontsize=7)  # fmt: skip
    return figure


def _controls(axes: Axes, controls: pd.DataFrame) -> None:
    for _, row in controls.dropna(subset="score").iterrows():
        place = float(row["place"]) + 0.42
        axes.plot(place, row["score"], marker="x", color=CONTROL_COLOR, markersize=5,
                  linestyle="none", zorder=3)  # fmt: skip
        axes.annotate(str(row["name"]), (place, row["score"]), xytext=(4, 4),
                      textcoords="offset points", ha="right", va="bottom", fontsize=6.5,
                      color=CONTROL_COLOR)  # fmt: skip


def _rounded(values: pd.Series[float]) -> list[float]:
    """Return costs so that those of one kind meet: heads differ by a few thousandths."""
    return [float(f"{value:.2g}") for value in values]
