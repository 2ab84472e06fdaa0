"""Cosines of task vectors: right where a careless computation is wrong."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from fusion.method import TaskVectorCosSimilarity
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.models import CifarResNet, find_layers
from fusion.weights import save_safetensors


@pytest.fixture
def models():
    """A base and three experts, two of which went some way together."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = CifarResNet(8, num_classes=10)

    def changed(common: float, seed: int):
        expert = copy.deepcopy(base)
        generator.manual_seed(100)
        shared = [torch.randn(p.shape, generator=generator) for p in expert.parameters()]
        generator.manual_seed(seed)
        with torch.no_grad():
            for p, s in zip(expert.parameters(), shared, strict=True):
                p += 1e-2 * (common * s + torch.randn(p.shape, generator=generator))
        return expert

    experts = {"a": changed(1, 1), "b": changed(1, 2), "c": changed(-0.5, 3)}
    return {"_pretrained_": base, **experts}


def dense(models, names=None):
    """Return the task vectors (n, k) in float64."""
    base = dict(models["_pretrained_"].named_parameters())
    names = list(base) if names is None else names
    rows = []
    for member, model in models.items():
        if member != "_pretrained_":
            state = model.state_dict()
            rows.append(
                torch.cat(
                    [(state[n].double() - base[n].detach().double()).flatten() for n in names]
                )
            )
    return torch.stack(rows)


def cosines(vectors):
    norms = vectors.norm(dim=1)
    return (vectors @ vectors.T / norms.outer(norms)).numpy()


def run(models, **options):
    analysis = TaskVectorCosSimilarity(plot_heatmap=False, **options)
    analysis.run(models)
    return analysis


def test_it_agrees_with_the_dense_computation(models):
    similarity = run(models).similarity
    assert list(similarity.index) == list(similarity.columns) == ["a", "b", "c"]
    np.testing.assert_allclose(similarity.to_numpy(), cosines(dense(models)), rtol=0, atol=1e-7)
    assert (np.diag(similarity) == 1).all()


def test_checkpoints_are_read_and_never_built(models, tmp_path, monkeypatch):
    members = {}
    for name, model in models.items():
        path = tmp_path / f"{name}.safetensors"
        save_safetensors(path, model.state_dict())
        members[name] = Checkpoint(path, architecture=models["_pretrained_"])
    expected = run(models).similarity
    pool = BaseModelPool(members)
    monkeypatch.setattr(pool, "load_pretrained_model", lambda: models["_pretrained_"])
    monkeypatch.setattr(Checkpoint, "build", None)
    pd.testing.assert_frame_equal(run(pool).similarity, expected, check_exact=True)


def test_one_draw_for_all_experts_keeps_the_diagonal_and_the_estimate(models):
    truth = cosines(dense(models))
    estimates = []
    for seed in range(30):
        analysis = run(models, max_points_per_model=500, seed=seed)
        estimates.append(analysis.similarity.to_numpy())
        assert (np.diag(estimates[-1]) == 1).all()
        assert analysis.report["points"] == 500
    error = np.std(estimates, axis=0).max()
    assert 0.01 < error < 0.06  # 1/sqrt(500) is 0.045
    assert np.abs(np.mean(estimates, axis=0) - truth).max() < 4 * error / np.sqrt(30)
    same = run(models, max_points_per_model=500, seed=3).similarity.to_numpy()
    np.testing.assert_array_equal(same, estimates[3])


def test_more_points_than_entries_are_all_of_them(models):
    whole = run(models).similarity
    for points in (0, 10**9):
        similarity = run(models, max_points_per_model=points).similarity
        np.testing.assert_allclose(similarity, whole, rtol=0, atol=1e-12)


def test_counters_do_not_swamp_the_vector(models, caplog):
    for name in ("a", "b", "c"):
        for buffer in models[name].buffers():
            if not buffer.is_floating_point():
                buffer += 10**6
    with caplog.at_level(logging.INFO, logger="fusion"):
        similarity = run(models, trainable_only=False).similarity
    np.testing.assert_allclose(similarity, cosines(dense(models)), rtol=0, atol=1e-7)
    assert caplog.text.count("integers have no direction") == 1


def test_running_statistics_count_when_asked_for(models):
    models["a"].bn1.running_mean += 100
    models["b"].bn1.running_mean += 100
    assert run(models, trainable_only=False).similarity.loc["a", "b"] > 0.99
    assert run(models).similarity.loc["a", "b"] < 0.9


def test_a_frozen_head_in_one_expert_changes_nothing(models):
    expected = run(models).similarity
    models["b"].linear.requires_grad_(False)
    pd.testing.assert_frame_equal(run(models).similarity, expected, check_exact=True)


def test_heads_of_another_size_leave_the_rest_comparable(models):
    names = [n for n, _ in models["_pretrained_"].named_parameters() if "linear" not in n]
    models["b"].linear = torch.nn.Linear(64, 3)
    similarity = run(models).similarity
    np.testing.assert_allclose(similarity, cosines(dense(models, names)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_compared_as_they_are(models, dtype):
    models["b"].to(dtype)
    similarity = run(models).similarity
    np.testing.assert_allclose(similarity, cosines(dense(models)), rtol=0, atol=1e-7)


def test_an_untouched_expert_is_nan_with_a_warning(models, caplog):
    models["c"].load_state_dict(models["_pretrained_"].state_dict())
    similarity = run(models).similarity
    assert similarity.loc["c"].isna().all()
    assert similarity["c"].isna().all()
    assert similarity.loc["a", "a"] == 1
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert ["expert 'c'" in r.getMessage() for r in warnings] == [True]


def test_the_summary_tells_size_and_conflict(models):
    models["b"].conv1.load_state_dict(models["_pretrained_"].conv1.state_dict())
    summary = run(models).summary
    vectors = dense(models)
    base = torch.cat([p.detach().double().flatten() for p in models["_pretrained_"].parameters()])
    np.testing.assert_allclose(summary["norm"], vectors.norm(dim=1), rtol=1e-6)
    relative = vectors.norm(dim=1) / base.norm()
    np.testing.assert_allclose(summary["norm_relative_to_base"], relative, rtol=1e-6)
    unchanged = (vectors == 0).double().mean(1)
    np.testing.assert_allclose(summary["unchanged_share"], unchanged, rtol=0, atol=1e-12)
    assert summary.loc["b", "unchanged_share"] > 0.005
    differ = vectors[0].sign() * vectors[2].sign() < 0
    both = vectors[0].abs() + vectors[2].abs()
    share = both[differ].sum() / both.sum()
    assert_close(summary.loc["a", "sign_conflict_with_c"], share.item(), rtol=0, atol=1e-6)
    assert summary.loc["c", "sign_conflict_with_a"] == summary.loc["a", "sign_conflict_with_c"]


def test_a_sample_estimates_the_whole_norm(models):
    whole = run(models).summary["norm"]
    sampled = run(models, max_points_per_model=5000).summary["norm"]
    np.testing.assert_allclose(sampled, whole, rtol=0.05)


def test_layers_stand_in_forward_order_with_the_norm_that_follows(models):
    table = run(models, per_layer=True).layer_similarity
    layers = find_layers(models["_pretrained_"])
    assert table["layer"].drop_duplicates().tolist() == [layer.name for layer in layers]
    assert len(table) == 3 * len(layers)
    parameters = dict(models["_pretrained_"].named_parameters())
    for layer in (layers[0], layers[3]):
        names = [name for name in layer.tensors if name in parameters]
        truth = cosines(dense(models, names))
        rows = table[table["layer"] == layer.name].set_index(["expert_a", "expert_b"])["cosine"]
        assert_close(rows["a", "c"], truth[0, 2], rtol=0, atol=1e-7)
        assert_close(rows["a", "b"], truth[0, 1], rtol=0, atol=1e-7)


def test_a_network_that_cannot_be_traced_has_its_layers_by_module(caplog):
    class Untraceable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(3, 3)
            self.second = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() > 0 else self.second(x)

    pool = {"_pretrained_": Untraceable(), "a": Untraceable(), "b": Untraceable()}
    table = run(pool, per_layer=True).layer_similarity
    assert table["layer"].tolist() == ["first", "second"]
    assert "order of the state dict" in caplog.text


def test_the_files_hold_the_tables(models, tmp_path):
    analysis = TaskVectorCosSimilarity(per_layer=True, cluster=True, output_path=tmp_path)
    analysis.run(models)
    written = pd.read_csv(tmp_path / "task_vector_cos_similarity.csv", index_col=0)
    pd.testing.assert_frame_equal(written, analysis.similarity, check_exact=False, rtol=1e-15)
    assert {path.name for path in tmp_path.iterdir()} == {
        "task_vector_cos_similarity.csv",
        "task_vector_cos_similarity.pdf",
        "task_vector_cos_similarity.png",
        "task_vector_summary.csv",
        "task_vector_layer_similarity.csv",
        "task_vector_layer_similarity.pdf",
        "task_vector_layer_similarity.png",
    }


def test_one_expert_is_enough(models, tmp_path):
    pool = {name: models[name] for name in ("_pretrained_", "a")}
    TaskVectorCosSimilarity(per_layer=True, output_path=tmp_path).run(pool)
    assert (tmp_path / "task_vector_cos_similarity.pdf").exists()
    assert not (tmp_path / "task_vector_layer_similarity.pdf").exists()


TWO_PROCESSES = """
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from fusion.method import TaskVectorCosSimilarity, TaskVectorViolinPlot
from fusion.models import CifarResNet


def network(seed):
    torch.manual_seed(seed)
    return CifarResNet(8)


def main(fabric, folder):
    models = {"_pretrained_": network(0), "a": network(1), "b": network(2)}
    for name, options in {"all": {}, "some": {"max_points_per_model": 300}}.items():
        analysis = TaskVectorCosSimilarity(
            plot_heatmap=False, per_layer=True, output_path=folder / name, **options
        )
        if fabric is not None:
            analysis.fabric = fabric
            analysis.output_path = folder / str(fabric.global_rank) / name
        analysis.run(models)
    if fabric is not None:
        violins = TaskVectorViolinPlot(output_path=folder / str(fabric.global_rank) / "violins")
        violins.fabric = fabric
        violins.run(models)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Forked, not spawned: the packages are imported once.
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(main, folder / "two")
    main(None, folder / "one")
"""


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one_and_the_first_writes(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=200)
    for draw in ("all", "some"):
        tables = sorted(path.name for path in (tmp_path / "one" / draw).iterdir())
        assert len(tables) == 3
        for table in tables:
            alone = (tmp_path / "one" / draw / table).read_text()
            assert (tmp_path / "two" / "0" / draw / table).read_text() == alone
    assert (tmp_path / "two" / "0" / "violins" / "task_vector_violin.pdf").exists()
    assert [path for path in (tmp_path / "two" / "1").rglob("*") if path.is_file()] == []


NUMBERS_ONLY = """
import sys
import torch
from fusion.method import TaskVectorCosSimilarity

pool = {"_pretrained_": torch.nn.Linear(3, 3), "a": torch.nn.Linear(3, 3)}
TaskVectorCosSimilarity(plot_heatmap=False, output_path=sys.argv[1]).run(pool)
print(sorted({"matplotlib", "seaborn", "lightning"} & set(sys.modules)))
"""


def test_numbers_need_neither_a_plot_library_nor_lightning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NUMBERS_ONLY, str(tmp_path)], check=True, capture_output=True
    )
    assert done.stdout.split() == [b"[]"]
