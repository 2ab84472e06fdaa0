"""Accuracy and loss along the line between two networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fusion.figures.style import PAGE_WIDTH, house_style, new_figure, palette

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {
    "interpolate": "interpolated",
    "merge": "mixture's statistics",
    "recalibrate": "recalibrated",
    "repair": "REPAIR",
}
_NAMES = {"none": "as they are", "weights": "aligned by weights", "activations": "by activations"}


def barrier_figure(table: pd.DataFrame) -> Figure:
    """Draw one column per treatment of batch norm: accuracy above, loss below.

    Args:
        table: rows with ``alignment``, ``batch_norm``, ``t`` in 0..1, ``accuracy`` in 0..1 and
            ``loss``; several rows of one point (pairs of networks) become a mean with its
            standard error as a band.
    """
    treatments = list(dict.fromkeys(table["batch_norm"]))
    alignments = list(dict.fromkeys(table["alignment"]))
    styles = dict(zip(alignments, palette(len(alignments)), strict=True))
    with house_style():
        figure = new_figure(width=PAGE_WIDTH, height=4.0)
        grid = figure.subplots(2, len(treatments), sharex=True, sharey="row", squeeze=False)
        for column, treatment in enumerate(treatments):
            for row, (metric, factor) in enumerate((("accuracy", 100.0), ("loss", 1.0))):
                axes = grid[row, column]
                for how in alignments:
                    chosen = (table["batch_norm"] == treatment) & (table["alignment"] == how)
                    points = (factor * table[chosen].set_index("t")[metric]).groupby(level=0)
                    mean, error = points.mean(), points.sem().fillna(0)
                    style = styles[how]
                    axes.plot(
                        mean.index,
                        mean,
                        color=style.color,
                        linestyle=style.linestyle,
                        marker=style.marker,
                        label=_NAMES.get(how, how),
                        clip_on=False,
                    )
                    axes.fill_between(
                        mean.index, mean - error, mean + error, color=style.color, alpha=0.2, lw=0
                    )
                axes.set_ylim(bottom=0)
            grid[0, column].set_title(f"batch norm: {_TITLES.get(treatment, treatment)}")
            grid[0, column].set_ylim(0, 100)
            grid[1, column].set_xlabel("from the first network to the second")
        grid[0, 0].set_ylabel("accuracy (%)")
        grid[1, 0].set_ylabel("cross-entropy (nats)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure
