"""The heatmap of cosines: what it shows and in which order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fusion.figures.similarity_heatmap import cluster_order, similarity_heatmap
from fusion.figures.style import PAGE_WIDTH


def similarity(count: int, seed: int = 0) -> pd.DataFrame:
    vectors = np.random.default_rng(seed).standard_normal((count, 50))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"expert_{number}" for number in range(count)]
    return pd.DataFrame(vectors @ vectors.T, index=names, columns=names)


def numbers(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(("count", "annotated"), [(1, True), (2, True), (8, True), (30, False)])
def test_numbers_are_written_while_they_are_legible_on_a_page(count, annotated):
    figure = similarity_heatmap(similarity(count))
    assert len(numbers(figure)) == (count**2 if annotated else 0)
    assert figure.get_figwidth() <= PAGE_WIDTH + 1e-9
    figure.canvas.draw()
    for label in figure.axes[0].get_yticklabels():
        assert label.get_window_extent().x0 >= 0


def test_the_scale_is_fixed_with_nothing_in_the_middle():
    figure = similarity_heatmap(similarity(3) / 10)
    mesh = figure.axes[0].collections[0]
    assert mesh.get_clim() == (-1, 1)
    middle = mesh.cmap(mesh.norm(0.0))
    assert min(middle[:3]) > 0.95


def test_cells_without_a_number_are_explained():
    table = similarity(3)
    table.iloc[1] = np.nan
    table.iloc[:, 1] = np.nan
    figure = similarity_heatmap(table, cluster=True)
    assert len(numbers(figure)) == 4
    assert figure.legends[0].get_texts()[0].get_text() == "not changed from the base"
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["expert_0", "expert_2", "expert_1"]
    assert similarity_heatmap(similarity(3)).legends == []


def test_clustering_puts_families_side_by_side():
    family = np.array([0, 1, 0, 1, 2, 0, 2])
    values = np.where(family[:, None] == family[None, :], 0.8, 0.1)
    np.fill_diagonal(values, 1)
    ordered = family[cluster_order(values)]
    assert (np.diff(ordered) != 0).sum() == 2


def test_clustering_moves_values_along_with_names():
    table = similarity(6)
    figure = similarity_heatmap(table, cluster=True)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    shown = np.asarray(figure.axes[0].collections[0].get_array())
    np.testing.assert_array_equal(shown, table.loc[names, names])
    assert names != list(table.index)
