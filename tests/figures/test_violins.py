"""Violins: one axis, honest quartiles, a density that integrates to what it should."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from fusion.figures.violins import _density, violins


def values(experts: int, points: int = 500) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    data = generator.standard_t(3, (points, experts)) * (1 + np.arange(experts))
    return pd.DataFrame(data, columns=[f"expert_{number}" for number in range(experts)])


@pytest.mark.parametrize("experts", [1, 2, 8, 30])
@pytest.mark.parametrize("absolute", [False, True])
def test_every_expert_is_named_on_one_axis(experts, absolute):
    figure = violins(values(experts), "500 of 1,000 points", absolute=absolute)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(values(experts).columns)
    assert "500 of 1,000 points" in axes.get_title(loc="left")
    assert "2.0% of the values lie beyond" in axes.get_title(loc="left")
    assert (axes.get_xlim()[0] == 0) == absolute
    assert plt.get_fignums() == []


def test_the_quartiles_are_those_of_all_points():
    data = values(2)
    axes = violins(data, "").axes[0]
    bars = [c for c in axes.collections if len(getattr(c, "get_segments", list)()) == 1]
    for column in range(2):
        bar, median = (c.get_segments()[0] for c in bars[2 * column : 2 * column + 2])
        quartiles = np.quantile(data.iloc[:, column], [0.25, 0.5, 0.75])
        np.testing.assert_allclose(bar[:, 0], quartiles[[0, 2]])
        np.testing.assert_allclose(median[:, 0], quartiles[1])


def test_the_density_is_that_of_the_points():
    data = np.random.default_rng(0).standard_normal(20_000)
    at, density = _density(data, -3.0, 3.0, reflect=False)
    truth = np.exp(-(at**2) / 2)
    np.testing.assert_allclose(density / density.max(), truth, atol=0.06)
    at, density = _density(np.abs(data), 0.0, 3.0, reflect=True)
    np.testing.assert_allclose(density / density.max(), np.exp(-(at**2) / 2), atol=0.06)


def test_options_of_subplots_win():
    figure = violins(values(2), "", fig_kwargs={"figsize": (9, 5), "facecolor": "red"})
    assert figure.get_size_inches().tolist() == [9, 5]
    assert figure.get_facecolor() == (1, 0, 0, 1)


def test_constant_values_have_a_figure():
    figure = violins(pd.DataFrame({"a": np.zeros(10), "b": np.ones(10)}), "")
    figure.canvas.draw()
    violins(pd.DataFrame({"a": np.zeros(10)}), "", absolute=True).canvas.draw()
