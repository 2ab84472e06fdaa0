"""What the figures of the benchmark must show, read back from the drawing."""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest

from fusion.figures.benchmark_heatmap import benchmark_heatmap
from fusion.figures.benchmark_price import scores_against_data, scores_against_multiply_adds
from fusion.figures.benchmark_scores import benchmark_scores
from fusion.figures.benchmark_style import NEED_STYLES, needs_in_order
from fusion.figures.critical_difference import critical_difference_diagram

NEEDS = list(NEED_STYLES)


def scores(count: int) -> pd.DataFrame:
    rows = [(f"method {i}", NEEDS[i % 5], 80.0 + i, 0.5, 79.0 + i) for i in range(count)]
    return pd.DataFrame(rows, columns=["name", "group", "score", "error", "defaults"])


@pytest.mark.parametrize("count", [2, 25])
def test_methods_stand_in_groups_and_no_two_labels_touch(count: int) -> None:
    figure = benchmark_scores(scores(count), {"experts": 110.0, "base": 20.0})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = axes.get_yticklabels()
    groups = scores(count).set_index("name")["group"]
    shown = [groups[label.get_text()] for label in labels]
    assert shown == sorted(shown, key=NEEDS.index)
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: -box.y0)
    for upper, lower in itertools.pairwise(boxes):
        assert upper.y0 >= lower.y1 - 1
    told = [text.get_text() for text in axes.texts]
    assert "80.0 ± 0.5" in told
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "base: 20.0, left of the axis" in legend
    assert "experts: 110.0" in legend


@pytest.mark.parametrize("count", [2, 25])
def test_ranks_lie_where_they_are_and_bars_join_the_cliques(count: int) -> None:
    names = [f"method {i}" for i in range(count)]
    ranks = pd.Series([float(i + 1) for i in range(count)], index=names)
    cliques = [tuple(names[:2])]
    figure = critical_difference_diagram(ranks, 1.5, cliques, dict.fromkeys(names, "nothing"))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    frame = figure.bbox
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x0 >= frame.x0
        assert box.x1 <= frame.x1
    stems = {line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 3}
    bar = next(line for line in axes.lines if line.get_linewidth() > 2)
    low, high = bar.get_xdata()
    assert sum(low <= x <= high for x in stems) == 2


@pytest.mark.parametrize(("methods", "settings"), [(2, 1), (25, 15)])
def test_every_cell_has_its_number(methods: int, settings: int) -> None:
    gains = pd.DataFrame(
        [[i - j + 0.04 for j in range(settings)] for i in range(methods)],
        index=[f"method {i}" for i in range(methods)],
        columns=[f"setting_{j}" for j in range(settings)],
    )
    gains.iloc[0, 0] = math.nan
    axes = benchmark_heatmap(gains, {}, label="gain").axes[0]
    assert len(axes.texts) == methods * settings - 1
    assert axes.texts[-1].get_text() == f"{methods - settings:+.1f}".replace("-", "−")
    low, high = axes.collections[0].get_clim()
    assert low == -high  # white is zero


def test_prices_name_the_best_of_each_column() -> None:
    table = pd.DataFrame(
        [
            ("a", "nothing", "defaults", 80.0, 1.0, "no data"),
            ("b", "gradients", "defaults", 90.0, 1.004, "images"),
            ("b", "gradients", "per task", 95.0, 4.0, "images"),
        ],
        columns=["name", "group", "condition", "score", "multiply_adds", "data"],
    )
    controls = pd.DataFrame([("experts", 100.0, 4.0)], columns=["name", "score", "multiply_adds"])
    figure = scores_against_multiply_adds(table, controls)
    named = [text.get_text() for text in figure.legends[1].get_texts()]
    assert named == ["b, defaults: 90.0", "b, per task: 95.0"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "4"]
    figure = scores_against_data(table, ("no data", "images", "labels"))
    named = [text.get_text() for text in figure.legends[1].get_texts()]
    assert named == ["a, defaults: 80.0", "b, per task: 95.0"]
    with pytest.raises(ValueError, match="no row"):
        scores_against_data(table.assign(score=math.nan), ("no data",))


def test_needs_keep_their_order() -> None:
    assert needs_in_order(["mine", "gradients", "nothing"]) == ["nothing", "gradients", "mine"]
