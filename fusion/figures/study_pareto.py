"""Accuracy against training time, with the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fusion.figures.study_style import (
    BASE,
    FRONT,
    finetuning_order,
    finetuning_style,
    interpolation_styles,
)
from fusion.figures.style import house_style, new_figure

if TYPE_CHECKING:
    import pandas as pd


_WIDTH = 5.2  # inches: on a phone still legible


def pareto_front(seconds: pd.Series[float], accuracy: pd.Series[float]) -> list[int]:
    """Return the positions on the Pareto front: more accurate than everything that is faster.

    In the order of their time. Of equals, only the first is included.
    """
    order = sorted(range(len(seconds)), key=lambda i: (seconds.iloc[i], -accuracy.iloc[i]))
    front: list[int] = []
    for i in order:
        if not front or accuracy.iloc[i] > accuracy.iloc[front[-1]]:
            front.append(i)
    return front


def study_pareto(table: pd.DataFrame) -> Figure:
    """Draw every fine-tuned merge as a point; colour shows the fine-tuning, the marker the merge.

    Args:
        table: one row per point with the columns ``name``, ``strategy``, ``interpolation`` (missing
            for the base), ``training_seconds`` and ``finetuned_accuracy`` (0 to 1), each with its
            ``…_error``.

    Raises:
        ValueError: no row was fine-tuned.
    """
    table = table.dropna(subset=["training_seconds", "finetuned_accuracy"]).reset_index(drop=True)
    if table.empty:
        raise ValueError("no row of the table was fine-tuned")
    named = [str(name) for name in table["interpolation"].dropna()]
    markers = {name: style.marker for name, style in interpolation_styles(named).items()}
    with house_style():
        figure = new_figure(width=_WIDTH, height=3.6)
        axes = figure.add_subplot()
        for _, row in table.iterrows():
            axes.errorbar(
                row["training_seconds"],
                100 * row["finetuned_accuracy"],
                xerr=_error(row, "training_seconds", 1),
                yerr=_error(row, "finetuned_accuracy", 100),
                marker=markers.get(str(row["interpolation"]), BASE.marker),
                color=finetuning_style(str(row["strategy"]))[0],
                markeredgecolor="black",
                markeredgewidth=0.5,
                markersize=6,
                ecolor="#7f7f7f",
                elinewidth=0.6,
                zorder=3,
            )
        front = pareto_front(table["training_seconds"], table["finetuned_accuracy"])
        best = table.iloc[front]
        axes.plot(
            best["training_seconds"],
            100 * best["finetuned_accuracy"],
            drawstyle="steps-post",
            color=FRONT,
            linewidth=0.9,
            zorder=1,
        )
        for place, (_, row) in enumerate(best.iterrows()):
            axes.annotate(
                str(place + 1),
                (row["training_seconds"], 100 * row["finetuned_accuracy"]),
                xytext=(-5, 4),  # nothing lies above and to the left of the front
                textcoords="offset points",
                ha="right",
            )
        named_best = [
            f"{place + 1}  {row['name']}; {finetuning_style(str(row['strategy']))[1]} trained"
            for place, (_, row) in enumerate(best.iterrows())
        ]
        # Slow and inaccurate: an empty corner.
        axes.text(0.98, 0.04, "\n".join(named_best), transform=axes.transAxes, ha="right",
                  linespacing=1.5, fontsize=7)  # fmt: skip
        axes.margins(y=0.1)
        axes.set_xlim(left=0)
        axes.set_xlabel("time of fine-tuning (s)")
        axes.set_ylabel("accuracy after fine-tuning (%)")
        handles: list[Line2D | Patch] = [
            Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=f"{words} trained")
            for color, words in map(finetuning_style, finetuning_order(table["strategy"]))
        ]
        shapes = {"base": BASE.marker} if table["interpolation"].isna().any() else {}
        shapes |= {name.upper(): marker for name, marker in markers.items()}
        handles += [
            Line2D([], [], color="white", markeredgecolor="black", marker=marker, linestyle="none",
                   label=name)
            for name, marker in shapes.items()
        ]  # fmt: skip
        handles.append(Line2D([], [], color=FRONT, label="Pareto front"))
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _error(row: pd.Series[float], column: str, scale: float) -> float | None:
    error = float(row.get(f"{column}_error", float("nan")))
    return None if error != error else scale * error
