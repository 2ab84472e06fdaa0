"""The benchmark's job: every condition is the method as a user would run it, and the controls are
what they are called.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fusion
from fusion.data import ClassSubset, ImageTensors
from fusion.errors import NotApplicableError, UserError
from fusion.method import BenchmarkControls, Benchmarked
from fusion.method.presets import preset
from fusion.modelpool import BaseModelPool, TrainedModel
from fusion.models import CifarResNet, MultiTaskNetwork
from fusion.taskpool import ClassificationTaskPool, Contestant, Ensemble
from fusion.weights import tensors_of

CHOICES = {"task_arithmetic": {"scale": [0.1, 0.5]}}


@pytest.fixture(scope="module")
def data(train_digits: ImageTensors) -> dict[str, ClassSubset]:
    few = train_digits.select(torch.arange(300))
    return {"a": ClassSubset(few, (0, 1, 2, 3)), "b": ClassSubset(few, (4, 5, 6, 7, 8, 9))}


@pytest.fixture
def modelpool(pool: dict[str, nn.Module], data: dict[str, ClassSubset]) -> BaseModelPool:
    return BaseModelPool(pool, train_datasets=data, val_datasets=data)


def benchmarked(name: str, **options: Any) -> Benchmarked:
    return Benchmarked(method=preset(name), name=name, **options)


def states(network: nn.Module) -> list[dict[str, torch.Tensor]]:
    several = isinstance(network, MultiTaskNetwork)
    networks = network.networks if several else [network]
    return [dict(tensors_of(one)) for one in networks]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for first, second in zip(states(one), states(other), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_job_trains_the_members_together_with_other_jobs(modelpool, data, monkeypatch) -> None:
    asked: list[BaseModelPool] = []
    monkeypatch.setattr(BaseModelPool, "train", lambda pool: asked.append(pool))
    benchmarked("simple_average", oracle=False).run(modelpool)
    assert asked == [modelpool]


def test_each_condition_is_the_method_with_these_options(modelpool, data) -> None:
    method = benchmarked(
        "task_arithmetic",
        choices=CHOICES,
        variants={"task_arithmetic": {"rows normalised": {"normalise_rows": True}}},
    )
    result = method.run(modelpool)
    assert_same(result, fusion.merge(modelpool, "task_arithmetic", batch_norm="recalibrate"))
    for name, options in {
        "defaults, recalibrate_per_task": {"batch_norm": "recalibrate_per_task"},
        "defaults, merge": {"batch_norm": "merge"},
    }.items():
        assert_same(method.controls[name](), fusion.merge(modelpool, "task_arithmetic", **options))
    conditions = method.report["conditions"]
    chosen = conditions["chosen, recalibrate"]["chosen"]["scale"]
    assert chosen in CHOICES["task_arithmetic"]["scale"]
    again = fusion.merge(modelpool, "task_arithmetic", scale=chosen, batch_norm="recalibrate")
    assert_same(method.controls["chosen, recalibrate"](), again)
    scale = conditions["rows normalised, recalibrate"]["chosen"]["scale"]  # chosen for the variant
    variant = {"batch_norm": "recalibrate", "normalise_rows": True, "scale": scale}
    other = fusion.merge(modelpool, "task_arithmetic", **variant)
    assert_same(method.controls["rows normalised, recalibrate"](), other)
    per_task = {"batch_norm": "recalibrate_per_task", "scale": chosen}
    other = fusion.merge(modelpool, "task_arithmetic", **per_task)
    assert_same(method.controls["chosen, recalibrate_per_task"](), other)
    images = sum(len(dataset) for dataset in data.values())
    assert conditions["merged"]["images"] == conditions["oracle head"]["labels"] == images
    assert conditions["merged"]["labels"] == conditions["defaults, merge"]["images"] == 0
    assert conditions["chosen, recalibrate"]["labels"] == images  # of validation, the same here
    assert set(conditions) == {"merged", *method.controls}
    assert all(c["parameters"] > 0 and c["multiply_adds"] > 0 for c in conditions.values())
    assert method.report["needs"] == ["a pretrained model"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"choices": {"task_arithmetic": {"scal": [0.1, 0.2]}}},
        {"choices": {"task_arithmetic": {"scale": [0.1, "wide"]}}},
        {"variants": {"task_arithmetic": {"rows normalised": {"normalize_rows": True}}}},
    ],
)
def test_a_wrong_choice_is_found_before_any_work(modelpool, wrong) -> None:
    with pytest.raises(UserError, match=r"scal|normali[sz]e_rows"):
        benchmarked("task_arithmetic", **wrong).check_pool(modelpool)


def test_the_oracle_head_changes_the_heads_alone(modelpool, data) -> None:
    method = benchmarked("simple_average")
    result = method.run(modelpool)
    oracle = method.controls["oracle head"]()
    for first, second in zip(states(result), states(oracle), strict=True):
        changed = {key for key in first if not torch.equal(first[key], second[key])}
        assert changed == {"linear.weight", "linear.bias"}
    tasks = ClassificationTaskPool(data)
    found = tasks.evaluate_all(
        {"merged": Contestant(lambda: result), "oracle": Contestant(lambda: oracle)}
    )
    for task in data:  # on the images that it was fitted on
        assert found["oracle"][task]["accuracy"] > found["merged"][task]["accuracy"]
    assert "chosen, recalibrate" not in method.controls  # nothing to choose


def test_a_method_that_needs_a_base_does_not_apply_without_one(modelpool, experts, data) -> None:
    apart = BaseModelPool(experts, train_datasets=data)
    with pytest.raises(NotApplicableError, match="needs a base"):
        benchmarked("wudi").run(apart)
    aligned = benchmarked("simple_average", common={"align": "weights"})
    aligned.run(apart)
    assert aligned.report["conditions"]["merged"]["batch_norm"] == "recalibrate"
    assert benchmarked("git_rebasin", common={"align": "weights"}).common == {}


@pytest.mark.parametrize("name", ["zipit", "task_arithmetic", "layerwise_least_squares"])
def test_a_network_without_running_statistics_has_no_treatment(name, data) -> None:
    networks = {
        member: CifarResNet(8, classes, in_channels=1, width=0.5, norm="group").eval()
        for member, classes in (("_pretrained_", 10), ("a", 4), ("b", 6))
    }
    pool = BaseModelPool(networks, train_datasets=data, val_datasets=data)
    method = benchmarked(name, oracle=False)
    method.check_pool(pool)
    assert isinstance(method.run(pool), nn.Module)
    assert {c["batch_norm"] for c in method.report["conditions"].values()} == {"pretrained"}


def test_the_controls_are_what_they_are_called(modelpool, experts) -> None:
    method = BenchmarkControls(draws=2)
    result = method.run(modelpool)
    assert_same(result, fusion.merge(modelpool, "simple_average"))
    for name, expert in experts.items():
        assert_same(method.controls[f"expert: {name}"](), expert)
    assert isinstance(method.controls["ensemble"](), Ensemble)
    per_task = method.controls["average per task"]()
    own = method.controls["own first"]()
    for task in own.tasks:
        state, average = own.for_task(task).state_dict(), per_task.for_task(task).state_dict()
        assert torch.equal(state["conv1.weight"], experts[task].conv1.weight)
        for key, tensor in state.items():
            if key.endswith("weight") and key != "conv1.weight":
                assert torch.equal(tensor, average[key])
    first, second = (method.controls[f"ranked by random, draw {n}"]() for n in (1, 2))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert "joint training" not in method.controls  # these experts are no recipes


def test_joint_training_begins_at_the_base_and_learns_all_tasks(tmp_path) -> None:
    digits = {"_target_": "fusion.data.digits", "split": "train"}
    recipe: dict[str, Any] = {
        "architecture": {
            "_target_": "fusion.models.CifarResNet",
            "depth": 8,
            "in_channels": 1,
            "width": 0.5,
        },
        "epochs": 2,
        "lr": 0.01,
        "batch_size": 64,
        "cache_dir": tmp_path,
    }
    parts = {
        name: {"_target_": "fusion.data.ClassSubset", "dataset": digits, "classes": classes}
        for name, classes in {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}.items()
    }
    networks = copy.deepcopy(recipe["architecture"])
    networks["num_classes"] = 5
    models: dict[str, object] = {"_pretrained_": TrainedModel(dataset=digits, **recipe)}
    for name, part in parts.items():
        models[name] = TrainedModel(
            dataset=part, init_from="_pretrained_", **{**recipe, "architecture": networks}
        )
    modelpool = BaseModelPool(models, train_datasets={"_pretrained_": digits, **parts})
    method = BenchmarkControls(draws=1)
    method.run(modelpool)
    joint = method.controls["joint training"]()
    found = ClassificationTaskPool(
        {name: modelpool.dataset(name) for name in parts}, joint=None
    ).evaluate_all({"joint": Contestant(lambda: joint, method.result_labels(modelpool))})["joint"]
    assert all(found[name]["accuracy"] > 0.8 for name in parts)
    assert method.report["conditions"]["joint training"]["seconds"] > 0
