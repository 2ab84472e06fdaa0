"""Heatmap of the gain of every method over a reference in every setting, with numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusion.figures.benchmark_style import need_handles, need_style
from fusion.figures.similarity_heatmap import ABSENT
from fusion.figures.style import house_style, new_figure

DIVERGING = "RdBu"  # blue gains, red loses, white in the middle; safe for the colour-blind

# All in inches.
_CELL = (0.46, 0.19)
_LETTER = 0.062
_BAR = 0.9
_LEGEND_ROW = 0.16
_NARROWEST = 3.8  # a legend of two columns
_WIDE = 0.8  # quantile of the sizes that the colours span: beyond, one outlier bleaches the rest
_LEAST = 1.0  # points: a span below would paint noise
_DARK = 0.62  # of the span: beyond, numbers are written in white


def benchmark_heatmap(
    gains: pd.DataFrame, groups: Mapping[str, str], *, label: str, absent: str = "not measured"
) -> Figure:
    """Draw methods × settings on a scale that is white at zero; colours end, numbers do not.

    Args:
        gains: methods × settings, in points.
        groups: method → its requirement, which sets the colour of its name.
        label: the title, which names the reference.
        absent: what a grey cell means.
    """
    names, settings = ([str(n) for n in axis] for axis in (gains.index, gains.columns))
    values = gains.to_numpy(dtype=float)
    sizes = np.abs(values[~np.isnan(values)])
    span = max(float(np.quantile(sizes, _WIDE)) if len(sizes) else 0.0, _LEAST)
    beyond = bool((sizes > span).any())
    slanted = 0.72 * _LETTER * max(map(len, settings)) + 0.1
    needs = [groups.get(name, "nothing") for name in names]
    entries = len(set(needs)) + bool(np.isnan(values).any())
    with house_style():
        side = _LETTER * max(map(len, names)) + 0.15
        width = max(side + _CELL[0] * len(settings) + _BAR + 0.3, _NARROWEST)
        columns = 2 if width < 6 else 3
        legend = _LEGEND_ROW * -(-entries // columns) + 0.1
        height = max(_CELL[1] * len(names), 0.8) + slanted + legend + 0.35
        figure = new_figure(width=width, height=height)
        axes = figure.add_subplot()
        axes.grid(visible=False)
        axes.set_facecolor(ABSENT)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values), cmap=DIVERGING, vmin=-span, vmax=span,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        axes.invert_yaxis()
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        for tick, need in zip(axes.get_yticklabels(), needs, strict=True):
            tick.set_color(need_style(need).color)
        axes.set_xticks(np.arange(len(settings)) + 0.5, settings, rotation=45, ha="right",
                        rotation_mode="anchor")  # fmt: skip
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = abs(value) > _DARK * span
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{round(value, 1) + 0.0:+.1f}".replace("-", "−"),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if dark else "black",
                )
        bar = figure.colorbar(mesh, ax=axes, aspect=18, pad=0.02,
                              extend="both" if beyond else "neither")  # fmt: skip
        bar.ax.set_title("points", fontsize=6.5)
        axes.set_title(label, loc="left")
        bar.outline.set_visible(False)
        handles: list[object] = [*need_handles(needs)]
        if np.isnan(values).any():
            handles.append(Patch(color=ABSENT, label=absent))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)
    return figure
