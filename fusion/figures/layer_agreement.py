"""Agreement and conflict of experts: the cosine of every pair of task vectors in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion.figures.similarity_heatmap import ABSENT, DIVERGING
from fusion.figures.style import PAGE_WIDTH, house_style, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

_LIMITS = (0.1, 0.2, 0.5, 1.0)  # of the colour scale: the smallest that holds every cosine
_ROW = 0.125  # inches: a layer's name in its smallest legible size
_TALLEST = 8.5  # inches: what fits on a page; more layers share it
_COLUMN = 0.3  # inches
_NAMED_PAIRS = 30  # beyond, their names would touch
_LONGEST_NAME = 34  # characters; the end of a longer layer name is shown
_LETTER = 0.065  # inches: mean width of a letter of a tick label


def layer_agreement(table: pd.DataFrame) -> Figure:
    """Draw layers from top to bottom in the order of the forward pass, pairs of experts across.

    Mean and range over the pairs are drawn next to the map. Up to 30 pairs are named; more are
    sorted by their mean cosine. The colour scale is symmetric about 0.

    Args:
        table: one row for each layer and pair, with the columns ``position`` (order of the layers),
            ``layer``, ``expert_a``, ``expert_b`` and ``cosine`` (NaN where an expert did not
            change).
    """
    layers = table.sort_values("position")["layer"].drop_duplicates().astype(str).tolist()
    wide = table.pivot(index="position", columns=["expert_a", "expert_b"], values="cosine")
    pairs = table[["expert_a", "expert_b"]].drop_duplicates().itertuples(index=False)
    wide = wide[[tuple(pair) for pair in pairs]]
    named = wide.shape[1] <= _NAMED_PAIRS
    if not named:
        wide = wide[wide.mean().sort_values().index]
    values = wide.to_numpy(dtype=float)
    count, pair_count = values.shape

    names = [n if len(n) <= _LONGEST_NAME else f"…{n[1 - _LONGEST_NAME :]}" for n in layers]
    left = _LETTER * max(map(len, names)) + 0.3
    with house_style():
        map_width = min(_COLUMN * pair_count, PAGE_WIDTH - left - 2.0)
        labels = [" · ".join(map(str, pair)) for pair in wide.columns.to_list()] if named else []
        below = _LETTER * max(map(len, labels), default=0) + 0.5
        figure = new_figure(
            width=left + map_width + 2.0, height=min(_ROW * count, _TALLEST) + below
        )
        grid, side = figure.subplots(1, 2, sharey=True, width_ratios=[map_width, 1.1])
        largest = np.nanmax(np.abs(values), initial=0.0)
        limit = next((limit for limit in _LIMITS if limit >= largest), 1.0)
        grid.grid(visible=False)
        grid.set_facecolor(ABSENT)
        mesh = grid.pcolormesh(
            np.ma.masked_invalid(values), cmap=DIVERGING, vmin=-limit, vmax=limit
        )
        grid.set_ylim(count, 0)
        step = -(-count // int(_TALLEST / _ROW))
        grid.set_yticks(np.arange(0, count, step) + 0.5, names[::step], fontsize=6)
        grid.set_ylabel("layer, in the order of the forward pass")
        if named:
            grid.set_xticks(np.arange(pair_count) + 0.5, labels, fontsize=6, rotation=90)
        else:
            grid.set_xticks([])
            grid.set_xlabel(f"{pair_count} pairs of experts, by mean cosine")
        for axes in (grid, side):
            for spine in axes.spines.values():
                spine.set_visible(False)
        _draw_range(side, values)
        bar = figure.colorbar(
            mesh, ax=side, ticks=[-limit, 0, limit], shrink=min(1.0, 2.0 / (_ROW * count)), pad=0.1
        )
        bar.set_label("cosine")
        bar.outline.set_visible(False)
    return figure


def _draw_range(axes: Axes, values: NDArray[np.float64]) -> None:
    """Draw each layer's mean over the pairs, and the range from least to most."""
    known = ~np.isnan(values).all(axis=1)
    rows = np.flatnonzero(known) + 0.5
    shown = values[known]
    axes.axvline(0, color="black", linewidth=0.6)
    axes.hlines(rows, np.nanmin(shown, 1), np.nanmax(shown, 1), color="#7f7f7f", linewidth=1.2)
    axes.plot(np.nanmean(shown, 1), rows, "o", color="black", markersize=2.2)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_xlabel("cosine:\nmean, range" if values.shape[1] > 1 else "cosine")
    axes.locator_params(axis="x", nbins=3)
