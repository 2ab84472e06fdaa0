"""Accuracy against the share of layers that is merged, a line for each interpolation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion.figures.study_style import (
    BASE,
    RANDOM,
    finetuning_order,
    finetuning_style,
    interpolation_styles,
)
from fusion.figures.style import PAGE_WIDTH, MemberStyle, house_style, new_figure

if TYPE_CHECKING:
    import pandas as pd

_PANEL = 2.2  # inches: height


def study_share(table: pd.DataFrame, *, control: float | None = None, unit: str = "") -> Figure:
    """Draw zero-shot accuracy, and that after each fine-tuning, against the share of layers.

    Lines join merges that differ in their share alone: ranked as most of the merges are. Those
    ranked at random are the grey line; other rankings and weightings stand as single points.

    Args:
        table: a row for each merge and fine-tuning with the columns ``share`` (0 to 1),
            ``interpolation``, ``series`` (``usual``, ``random`` or ``other``), ``name``,
            ``strategy``, ``zero_shot_accuracy`` and ``finetuned_accuracy`` (0 to 1), each with
            its ``…_error``.
        control: accuracy of the base under the same batch-norm treatment, not merged.
        unit: of the vertical axis, after "accuracy".

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
    panels = [("zero_shot_accuracy", "", "zero-shot")]
    panels += [("finetuned_accuracy", s, finetuning_style(s)[1]) for s in tuned]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with house_style():
        figure = new_figure(width=PAGE_WIDTH if columns > 1 else 3.6, height=_PANEL * rows + 0.4)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for index, (column, strategy, title) in enumerate(panels):
            axes = grid[index // columns][index % columns]
            shown = table[table["strategy"] == strategy] if strategy else table
            _panel(axes, shown, column)
            axes.set_title(title, loc="left")
            if control is not None and column == "zero_shot_accuracy":
                axes.axhline(
                    100 * control,
                    color=BASE.color,
                    linestyle="--",
                    linewidth=0.9,
                    label="base, same batch norm, not merged",
                )
            if index % columns == 0:
                axes.set_ylabel(f"accuracy (%){unit}")
            if index >= len(panels) - columns:
                axes.set_xlabel("share of layers merged (%)")
                axes.tick_params(labelbottom=True)
        for index in range(len(panels), rows * columns):
            grid[index // columns][index % columns].set_visible(False)
        entries = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3)
    return figure


def _panel(axes: Axes, table: pd.DataFrame, column: str) -> None:
    usual = table[table["series"] == "usual"]
    styles = interpolation_styles([str(name) for name in table["interpolation"].dropna()])
    for name, style in styles.items():
        _line(axes, usual[usual["interpolation"] == name], column, style, str(name).upper())
    _line(axes, table[table["series"] == "random"], column, RANDOM, "layers drawn at random")
    for name, rows in table[table["series"] == "other"].groupby("name", sort=False):
        style = styles[str(rows["interpolation"].iloc[0])]
        hollow = MemberStyle(style.color, style.marker, "")
        _line(axes, rows, column, hollow, str(name), hollow=True)


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
