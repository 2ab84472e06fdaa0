"""Which tensors task vectors are made of, and what is refused before any work."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch

from fusion.errors import UserError
from fusion.method import TaskVectorCosSimilarity, TaskVectorViolinPlot, task_vectors
from fusion.method.task_vectors import compared_tensors, share_out
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet

ANALYSES = (TaskVectorCosSimilarity, TaskVectorViolinPlot)


def network(seed=0, classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CifarResNet(8, num_classes=classes)


def compared(models, *, trainable_only):
    return compared_tensors(BaseModelPool(models), trainable_only=trainable_only)


@pytest.fixture
def no_work(monkeypatch):
    """Fail if anything is read."""
    monkeypatch.setattr(task_vectors, "sum_task_vectors", None)
    monkeypatch.setattr(task_vectors, "sample_task_vectors", None)


def test_a_head_of_another_size_is_left_out_by_name(caplog):
    base, a, b = network(), network(1), network(2, classes=4)
    with caplog.at_level(logging.INFO, logger="fusion"):
        analysis = TaskVectorCosSimilarity(plot_heatmap=False)
        analysis.run({"_pretrained_": base, "a": a, "b": b})
    assert "Left out (another shape in expert 'b'): linear.weight, linear.bias" in caplog.text
    names = [name for name, _ in base.named_parameters()]
    assert analysis.report["tensors"] == len(names) - 2
    assert analysis.report["left_out"]["linear.bias"] == "another shape in expert 'b'"


def test_the_base_decides_what_is_trainable():
    base, a, b = network(), network(1), network(2)
    every = compared({"_pretrained_": base, "a": a, "b": b}, trainable_only=True)
    b.linear.requires_grad_(False)
    assert compared({"_pretrained_": base, "a": a, "b": b}, trainable_only=True) == every
    base.linear.requires_grad_(False)
    fewer = compared({"_pretrained_": base, "a": a, "b": b}, trainable_only=True)
    assert set(every.infos) - set(fewer.infos) == {"linear.weight", "linear.bias"}
    assert fewer.left_out["linear.bias"] == "not trainable in the pretrained model"


def test_integer_buffers_are_never_compared():
    base, a = network(), network(1)
    for trainable_only in (True, False):
        tensors = compared({"_pretrained_": base, "a": a}, trainable_only=trainable_only)
        assert not any("num_batches_tracked" in name for name in tensors.infos)
        assert tensors.left_out["bn1.num_batches_tracked"] == "integers have no direction"
        assert ("bn1.running_mean" in tensors.infos) is not trainable_only


def test_tied_tensors_count_once():
    base = network()
    base.layer1[0].conv2.weight = base.layer1[0].conv1.weight
    tensors = compared({"_pretrained_": base, "a": copy.deepcopy(base)}, trainable_only=False)
    assert tensors.left_out["layer1.0.conv2.weight"] == "another name of a shared tensor"
    assert "layer1.0.conv1.weight" in tensors.infos


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"_pretrained_": network()}, "no experts"),
        ({"a": network()}, "no pretrained model"),
        ({"_pretrained_": network(), "a": torch.nn.Linear(3, 4)}, "no tensor in common"),
    ],
)
def test_nothing_to_compare_is_an_error_before_the_work(analysis, models, message, no_work):
    with pytest.raises(UserError, match=message):
        analysis().run(models)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_frozen_base_has_no_trainable_tensors(analysis, no_work):
    frozen = network().requires_grad_(False)
    with pytest.raises(UserError, match="trainable_only=false"):
        analysis().run({"_pretrained_": frozen, "a": network(1)})


@pytest.mark.parametrize("analysis", ANALYSES)
def test_an_unwritable_folder_is_an_error_before_the_work(analysis, tmp_path, no_work):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_path"):
        analysis(output_path=tmp_path / "file" / "folder").run(
            {"_pretrained_": network(), "a": network(1)}
        )


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_missing_checkpoint_is_an_error_that_names_the_model(analysis, tmp_path, no_work):
    from fusion.modelpool import Checkpoint

    lost = Checkpoint(tmp_path / "lost.safetensors", architecture=network())
    with pytest.raises(UserError, match=r"'a'.*lost\.safetensors"):
        analysis().run({"_pretrained_": network(), "a": lost})


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("member", ["_pretrained_", "b"])
def test_weights_that_are_not_finite_are_named(analysis, bad, member):
    models = {"_pretrained_": network(), "a": network(1), "b": network(2)}
    with torch.no_grad():
        models[member].layer2[0].conv1.weight[0, 0, 0, 0] = bad
    with pytest.raises(UserError, match=rf"'{member}': layer2\.0\.conv1\.weight") as error:
        analysis(max_points_per_model=None).run(models)
    assert str(error.value).count("model '") == 1


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_negative_number_of_points_is_an_error(analysis):
    with pytest.raises(UserError, match="max_points_per_model"):
        analysis(max_points_per_model=-1)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_the_pretrained_model_comes_back_and_nothing_is_changed(analysis):
    models = {"_pretrained_": network(), "a": network(1)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    result = analysis().run(models)
    assert result is not models["_pretrained_"]
    for name, tensor in result.state_dict().items():
        assert torch.equal(tensor, before["_pretrained_"][name])
    for name, state in before.items():
        for key, tensor in models[name].state_dict().items():
            assert torch.equal(tensor, state[key])


def test_tensors_are_shared_out_evenly():
    sizes = [5, 900, 20, 400, 400, 1, 30]
    shares = share_out(sizes, 2)
    assert sorted(shares[0] + shares[1]) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= 50
    assert share_out(sizes, 1)[0] == sorted(range(len(sizes)), key=lambda i: -sizes[i])
    assert share_out([7], 3) == [[0], [], []]
