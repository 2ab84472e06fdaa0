"""The sample behind the violins, and the files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from fusion.method import TaskVectorViolinPlot
from fusion.models import CifarResNet


@pytest.fixture
def models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: CifarResNet(8) for name in ("_pretrained_", "a", "b")}


def test_it_runs_and_writes_every_file(models, tmp_path):
    analysis = TaskVectorViolinPlot(fig_kwargs={"figsize": (5, 2)}, output_path=tmp_path)
    analysis.run(models)
    assert {path.name for path in tmp_path.iterdir()} == {
        "task_vector_violin.pdf",
        "task_vector_violin.png",
        "task_vector_violin_abs.pdf",
        "task_vector_violin_abs.png",
        "task_vector_violin.csv",
    }
    written = pd.read_csv(tmp_path / "task_vector_violin.csv")
    assert list(written.columns) == ["tensor", "index", "a", "b"]
    assert len(written) == 1000
    np.testing.assert_allclose(written[["a", "b"]], analysis.points, rtol=1e-6)


def test_each_point_is_an_entry_of_the_task_vector(models):
    analysis = TaskVectorViolinPlot(max_points_per_model=200, seed=5)
    analysis.run(models)
    assert len(analysis.points) == 200
    assert not analysis.points.index.duplicated().any()
    base = dict(models["_pretrained_"].named_parameters())
    for expert in ("a", "b"):
        state = models[expert].state_dict()
        for (tensor, index), value in analysis.points[expert].items():
            truth = (state[tensor] - base[tensor].detach()).flatten()[index].item()
            assert value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("points", [None, 0])
def test_none_and_zero_mean_all(models, points):
    analysis = TaskVectorViolinPlot(max_points_per_model=points)
    analysis.run(models)
    total = sum(p.numel() for p in models["_pretrained_"].parameters())
    assert len(analysis.points) == analysis.report["points"] == total


def test_an_unchanged_expert_has_a_violin_too(models, tmp_path):
    models["b"].load_state_dict(models["_pretrained_"].state_dict())
    analysis = TaskVectorViolinPlot(output_path=tmp_path)
    analysis.run(models)
    assert (analysis.points["b"] == 0).all()
    assert (tmp_path / "task_vector_violin.pdf").exists()
