"""Draw what scripts/method_table.py measured: the methods' scores, with standard errors.

    python scripts/methods_figure.py digits.csv docs/methods.png

Methods whose option was chosen on validation images are drawn with the chosen one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from fusion.figures.style import PNG_DPI, house_style, new_figure, palette

NAMES = {"regmean sequential": "regmean, sequential"}
LEFT_OUT = ("slerp", "model_stock", "average of random half", "base, experts' heads")
TREATMENTS = {"mixed": "one set of batch-norm statistics", "per task": "a set for each task"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    arguments = parser.parse_args()
    runs = pd.read_csv(arguments.csv)
    with house_style():
        figure = new_figure(width=5.0, height=3.6)
        draw(figure.add_subplot(), runs[~runs["model"].isin(LEFT_OUT)])
        figure.savefig(arguments.png, dpi=PNG_DPI)


def draw(axes: Axes, runs: pd.DataFrame) -> None:
    """Draw one row per method: mean and standard error of its score."""
    method = runs["model"].str.removesuffix(", chosen")
    chosen = set(method[runs["model"] != method])
    runs = runs.assign(method=method)[(runs["model"] != method) | ~method.isin(chosen)]
    scores = runs.groupby(["method", "batch_norm"])["score"].agg(["mean", "sem"])
    order = list(scores.xs("mixed", level="batch_norm")["mean"].sort_values().index)
    places = range(len(order))
    for (treatment, label), member in zip(TREATMENTS.items(), palette(2), strict=True):
        rows = scores.xs(treatment, level="batch_norm").reindex(order)
        axes.errorbar(
            rows["mean"],
            places,
            xerr=rows["sem"],
            color=member.color,
            marker=member.marker,
            linestyle="none",
            markersize=4,
            capsize=2,
            label=label,
        )
    axes.set_yticks(places, [NAMES.get(name, name) for name in order])
    axes.set_xlabel("accuracy, % of each task's expert: mean over tasks and seeds")
    axes.legend(loc="lower right")


if __name__ == "__main__":
    main()
