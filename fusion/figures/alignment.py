"""Figure of an alignment: share of moved units of each group, and gain of the moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fusion.figures.style import PAGE_WIDTH, house_style, new_figure, palette

if TYPE_CHECKING:
    import pandas as pd

_MOST_NAMES = 30  # more groups than this are numbered, because their names would overlap


def alignment_figure(table: pd.DataFrame) -> Figure:
    """Draw two panels over the groups of units in forward order, with one line per expert.

    Args:
        table: one row for each expert and group with the columns ``expert``, ``group``, ``size``,
            ``moved`` and ``gain`` (what the group's move added to the objective).

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("the table has no groups")
    groups = list(dict.fromkeys(table["group"]))
    experts = list(dict.fromkeys(table["expert"]))
    place = {group: index for index, group in enumerate(groups)}
    with house_style():
        figure = new_figure(width=PAGE_WIDTH, height=3.6)
        top, bottom = figure.subplots(2, 1, sharex=True)
        # The first style is that of the base, to which all experts were aligned.
        for expert, style in zip(experts, palette(len(experts) + 1)[1:], strict=True):
            rows = table[table["expert"] == expert]
            x = [place[group] for group in rows["group"]]
            look = {
                "color": style.color,
                "marker": style.marker,
                "linestyle": style.linestyle,
                "linewidth": 0.8,
            }
            top.plot(x, 100 * rows["moved"] / rows["size"], label=expert, **look)
            bottom.plot(x, rows["gain"], **look)
        top.set_ylim(-5, 105)
        top.set_ylabel("units moved (%)")
        bottom.set_ylabel("gain in the objective")
        bottom.ticklabel_format(axis="y", scilimits=(-2, 3))
        if len(groups) <= _MOST_NAMES:
            bottom.set_xticks(range(len(groups)), groups, rotation=45, ha="right",
                              rotation_mode="anchor")  # fmt: skip
        else:
            bottom.set_xlabel("group of units, in the order of the forward pass")
        if len(experts) > 1:
            figure.legend(loc="outside upper center", ncols=min(len(experts), 6))
        else:
            top.set_title(experts[0])
    return figure
