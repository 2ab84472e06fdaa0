"""Accuracy against the share of merged layers, with one line per interpolation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion.figures.study_style import (
    BASE,
    RANDOM,
    finetuning_order,
    finetuning_style,
    interpolation_styles,
)
from fusion.figures.style import MemberStyle, house_style, new_figure

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 5.2  # inches: on a phone still legible
_PANEL = 1.9  # inches: height
_HOLLOW = ("s", "o", "P", "X", "*", "d")  # markers of merges without a line


def study_share(
    table: pd.DataFrame, *, control: float | None = None, baseline: float | None = None
) -> Figure:
    """Draw accuracy, without and after each fine-tuning, against the share of layers.

    Lines join merges that differ in their share alone: ranked as most of the merges are. Those
    ranked at random are the grey line; other rankings and weightings are single points.

    Args:
        table: one row for each merge and fine-tuning with the columns ``share`` (0 to 1),
            ``interpolation``, ``series`` (``usual``, ``random`` or ``other``), ``name``,
            ``strategy``, ``merged_accuracy`` and ``finetuned_accuracy`` (0 to 1), each with
            its ``…_error``.
        control: accuracy of the base under the same batch-norm treatment, not merged.
        baseline: accuracy of the base with everything trained.

    Raises:
        ValueError: there is no merge with a share.
    """
    table = table[table["share"].notna()]
    if table.empty:
        raise ValueError("no row of the table has a share of layers")
    tuned = [
        s
        for s in finetuning_order(table["strategy"])
        if table.loc[table["strategy"] == s, "finetuned_accuracy"].notna().any()
    ]
    panels = [("merged_accuracy", "", "without fine-tuning")]
    panels += [("finetuned_accuracy", s, f"{finetuning_style(s)[1]} trained") for s in tuned]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with house_style():
        figure = new_figure(width=_WIDTH if columns > 1 else 3.6, height=_PANEL * rows + 0.7)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for index, (column, strategy, title) in enumerate(panels):
            axes = grid[index // columns][index % columns]
            shown = table[table["strategy"] == strategy] if strategy else table
            _panel(axes, shown, column)
            axes.set_title(title, loc="left")
            if control is not None and column == "merged_accuracy":
                axes.axhline(
                    100 * control,
                    color=BASE.color,
                    linewidth=0.7,
                    label="base, batch norm as in the merges",
                )
            if baseline is not None and strategy:
                axes.axhline(
                    100 * baseline,
                    color=BASE.color,
                    linestyle="--",
                    linewidth=0.9,
                    label="baseline: base, everything trained",
                )
            if index % columns == 0:
                axes.set_ylabel("accuracy (%)")
            if index >= len(panels) - columns:
                axes.set_xlabel("share of layers merged (%)")
                axes.tick_params(labelbottom=True)
        _scale(figure.axes[0], table["share"])
        for index in range(len(panels), rows * columns):
            grid[index // columns][index % columns].set_visible(False)
        entries: dict[str, Artist] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=2)
    return figure


def _scale(axes: Axes, share: pd.Series[float]) -> None:
    """Mark the shares there are; small ones lie close together, so the axis is logarithmic."""
    found = sorted(100 * share.unique())
    positive = [value for value in found if value > 0]
    axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    axes.set_xlim(-0.04 * positive[0] if found[0] == 0 else 0.9 * positive[0], 1.1 * found[-1])
    axes.set_xticks(found, [f"{value:g}" for value in found])
    axes.minorticks_off()


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    usual = table[table["series"] == "usual"]
    styles = interpolation_styles([str(name) for name in table["interpolation"].dropna()])
    for name, style in styles.items():
        _line(axes, usual[usual["interpolation"] == name], column, style, str(name).upper())
    _line(axes, table[table["series"] == "random"], column, RANDOM, "layers drawn at random")
    others = table[table["series"] == "other"].groupby("name", sort=False)
    for place, (label, rows) in enumerate(others):
        style = styles[str(rows["interpolation"].iloc[0])]
        hollow = MemberStyle(style.color, _HOLLOW[place % len(_HOLLOW)], "")
        _line(axes, rows, column, hollow, str(label), hollow=True)


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    column: str,
    style: MemberStyle,
    label: str,
    *,
    hollow: bool = False,
) -> None:
    if rows.empty:
        return
    points = rows.groupby("share")[[column, f"{column}_error"]].mean()
    axes.errorbar(
        100 * points.index.to_numpy(dtype=float),
        100 * points[column],
        yerr=100 * points[f"{column}_error"].fillna(0.0),
        color=style.color,
        marker=style.marker,
        linestyle=style.linestyle or "none",
        markerfacecolor="white" if hollow else style.color,
        markersize=5.5 if hollow else 4,
        elinewidth=0.7,
        label=label,
        zorder=3 if hollow else 2,
    )
