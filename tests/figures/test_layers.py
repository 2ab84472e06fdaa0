"""The layers' figure: every member and every selected layer is seen, however many there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from fusion.figures.layers import layer_snr_figure
from fusion.figures.style import save_figure


def table(layers: int, experts: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rank = generator.permutation(layers) + 1
    columns: dict[str, object] = {
        "layer": [f"features.{index}.block.{index % 3}.conv" for index in range(layers)],
        "position": range(layers),
        "rank": rank,
        "selected": rank <= math.ceil(0.1 * layers),
    }
    for member in ["_pretrained_", *(f"expert_{index}" for index in range(experts))]:
        snr = generator.gamma(1, 0.2, layers)
        columns[f"snr/{member}"] = np.where(snr < 0.05, 0, snr)
    return pd.DataFrame(columns)


@pytest.mark.parametrize(("layers", "experts"), [(4, 1), (21, 2), (51, 6), (160, 2), (60, 20)])
def test_nothing_is_missing_and_nothing_overlaps(layers, experts, tmp_path):
    data = table(layers, experts)
    figure = layer_snr_figure(data.sample(frac=1, random_state=0))
    (axes,) = figure.axes
    bands = [patch for patch in axes.patches if patch.get_width() == 1]
    assert len(bands) == data["selected"].sum()
    assert {round(band.get_x() + 0.5) for band in bands} == set(
        data.loc[data["selected"], "position"]
    )
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), data["snr/_pretrained_"])
    assert len(axes.get_lines()) == (1 + experts if experts < 7 else 2)
    save_figure(figure, tmp_path, "layers")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
    assert len(boxes) > 3
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert plt.get_fignums() == []


def test_a_layer_without_signal_is_drawn_at_zero_on_every_axis():
    data = table(12, 2)
    data.loc[3, "snr/expert_0"] = 1000.0  # makes the axis logarithmic
    data.loc[5, "snr/expert_0"] = 0.0
    axes = layer_snr_figure(data).axes[0]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylim()[0] == 0
    assert axes.get_lines()[1].get_ydata()[5] == 0


def test_a_table_that_is_none_is_refused():
    with pytest.raises(ValueError, match="rank, snr/…"):
        layer_snr_figure(pd.DataFrame({"layer": ["a"], "position": [0], "selected": [True]}))
    with pytest.raises(ValueError, match="no layer"):
        layer_snr_figure(table(4, 1).iloc[:0])
