"""Mean ranks on a line, joined where they do not differ (Demšar, 2006, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from fusion.figures.benchmark_style import need_handles, need_style
from fusion.figures.style import PAGE_WIDTH, house_style, new_figure

_AXIS = "#404040"
# All in inches.
_ROW = 0.165
_BAR = 0.08  # between two bars of equals
_LETTER = 0.062  # mean width of a letter of seven points
_NUMBER = 0.35  # the rank next to the name
_TOP = 0.62  # the bar of the critical difference and the numbers of the axis


def critical_difference_diagram(
    ranks: pd.Series[float],
    critical_difference: float,
    cliques: Sequence[Sequence[str]],
    groups: Mapping[str, str],
) -> Figure:
    """Draw the mean ranks; a bar joins methods whose ranks are not shown to differ.

    Args:
        ranks: method → mean rank, the best (lowest) first.
        critical_difference: of Nemenyi's test.
        cliques: the groups of methods that are joined.
        groups: method → its requirement, which sets the colour of its name.
    """
    names = [str(name) for name in ranks.index]
    left = (len(names) + 1) // 2
    side = _LETTER * max(map(len, names)) + _NUMBER
    width = PAGE_WIDTH - 2 * side
    low, high = 1.0, float(len(names))
    depth = 0.15 + _BAR * len(cliques) + 0.1
    with house_style():
        needs = [groups.get(name, "nothing") for name in names]
        legend = 0.17 * -(-len(set(needs)) // 3) + 0.1
        height = _TOP + depth + _ROW * left + legend
        figure = new_figure(width=PAGE_WIDTH, height=height)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, PAGE_WIDTH)
        axes.set_ylim(-(height - _TOP - legend), _TOP + legend)

        def at(rank: float) -> float:
            return side + width * (rank - low) / (high - low)

        axes.plot([at(low), at(high)], [0, 0], color=_AXIS, linewidth=0.7)
        step = -(-len(names) // 12)
        for rank in range(1, len(names) + 1):
            axes.plot([at(rank)] * 2, [0, 0.05], color=_AXIS, linewidth=0.7)
            if (rank - 1) % step == 0:
                axes.text(at(rank), 0.07, str(rank), ha="center", va="bottom", fontsize=7)
        end = min(at(low + critical_difference), PAGE_WIDTH - 0.1)
        axes.plot([at(low), end], [0.36] * 2, color="black", linewidth=1.2)
        for x in (at(low), end):
            axes.plot([x, x], [0.33, 0.39], color="black", linewidth=1.2)
        axes.text(at(low), 0.42, f"critical difference {critical_difference:.2f}", fontsize=7)
        for number, clique in enumerate(cliques):
            y = -0.12 - _BAR * number
            reach = [at(float(ranks[clique[0]])) - 0.04, at(float(ranks[clique[-1]])) + 0.04]
            axes.plot(reach, [y, y], color="black", linewidth=2.2, solid_capstyle="butt")
        for place, name in enumerate(names):
            on_left = place < left
            row = place if on_left else len(names) - 1 - place
            y = -depth - _ROW * row
            x, edge = at(float(ranks[name])), side - 0.05 if on_left else PAGE_WIDTH - side + 0.05
            color = need_style(groups.get(name, "nothing")).color
            axes.plot([x, x, edge], [0, y, y], color=color, linewidth=0.7, zorder=1)
            text = f"{ranks[name]:.1f}"
            text = f"{name}  {text}" if on_left else f"{text}  {name}"
            shift = -0.04 if on_left else 0.04
            axes.text(edge + shift, y, text, ha="right" if on_left else "left", va="center",
                      fontsize=7, color=color)  # fmt: skip
        figure.legend(handles=need_handles(needs), loc="upper center", ncols=3)
    return figure
