"""The figure of agreement by layer."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from fusion.figures.layer_agreement import layer_agreement
from fusion.figures.style import PAGE_WIDTH


def table(layers: int, experts: int, size: float = 1.0) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        (position, f"layer{position}.conv", f"e{a}", f"e{b}", size * generator.uniform(-1, 1))
        for position in range(layers)
        for a, b in combinations(range(experts), 2)
    ]
    return pd.DataFrame(rows, columns=["position", "layer", "expert_a", "expert_b", "cosine"])


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("experts", [2, 8, 30])
def test_layers_go_down_and_pairs_across(experts):
    data = table(62, experts).sample(frac=1, random_state=0)
    figure = layer_agreement(data)
    grid = figure.axes[0]
    assert labels(grid.yaxis) == [f"layer{position}.conv" for position in range(62)]
    assert grid.yaxis_inverted()
    assert grid.collections[0].get_array().shape == (62, experts * (experts - 1) // 2)
    assert figure.get_figwidth() <= PAGE_WIDTH + 1e-9


def test_few_pairs_are_named_and_many_are_put_in_order():
    named = layer_agreement(table(5, 4))
    pairs = [f"e{a} · e{b}" for a, b in combinations(range(4), 2)]
    assert labels(named.axes[0].xaxis) == pairs
    many = layer_agreement(table(5, 12))
    assert "66 pairs" in many.axes[0].get_xlabel()
    means = np.asarray(many.axes[0].collections[0].get_array()).mean(axis=0)
    assert (np.diff(means) >= 0).all()


@pytest.mark.parametrize(("size", "limit"), [(0.03, 0.1), (0.3, 0.5), (1.0, 1.0)])
def test_the_scale_is_symmetric_and_holds_every_value(size, limit):
    mesh = layer_agreement(table(9, 3, size)).axes[0].collections[0]
    assert mesh.get_clim() == (-limit, limit)


def test_an_expert_that_did_not_change_leaves_grey_cells():
    data = table(4, 3)
    data.loc[data["expert_b"] == "e2", "cosine"] = np.nan
    figure = layer_agreement(data)
    assert int(figure.axes[0].collections[0].get_array().mask.sum()) == 8
    data["cosine"] = np.nan
    figure = layer_agreement(data)
    figure.canvas.draw()


def test_more_layers_than_a_page_has_room_for_are_named_in_part():
    figure = layer_agreement(table(200, 2))
    assert 40 <= len(labels(figure.axes[0].yaxis)) <= 68
    assert figure.get_figheight() < 11
