"""The pipeline of all merges: heads by classes, batch norm by task, controls."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import fusion
from fusion.data import ClassSubset, grouped, quarter_turns
from fusion.errors import UserError
from fusion.merging import Piece, Rule
from fusion.merging.rules import EMR, Mean, TaskArithmetic
from fusion.method import Merge
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.models import CifarResNet, MultiTaskNetwork, find_head
from fusion.training import recalibrate_batch_norm


@pytest.fixture
def tasks_data(train_digits):
    parity = {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}
    half = {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}
    return {
        "parity": grouped(train_digits, parity),
        "half": grouped(train_digits, half),  # as many classes, of another meaning
        "turn": quarter_turns(train_digits),
    }


@pytest.fixture
def tasks_pool(net, base, tasks_data) -> BaseModelPool:
    """A base and experts of three tasks, two of whose heads have one shape."""
    experts = {
        name: moved(base, net(len(data.class_names), seed=seed))
        for seed, (name, data) in enumerate(tasks_data.items(), start=1)
    }
    return BaseModelPool({"_pretrained_": base, **experts}, train_datasets=tasks_data)


def moved(base: nn.Module, expert: nn.Module) -> nn.Module:
    """The expert with the base's body moved a little towards its own."""
    head = set(find_head(base).tensors)
    own, theirs = expert.state_dict(), base.state_dict()
    state = {
        key: own[key]
        if key in head or not own[key].is_floating_point()
        else theirs[key] + 0.1 * (own[key] - theirs[key])
        for key in own
    }
    expert.load_state_dict(state)
    return expert


def test_experts_of_different_tasks_share_a_body_and_keep_their_heads(tasks_pool, base) -> None:
    merge = Merge(rule=Mean(), batch_norm="merge")
    model = merge.run(tasks_pool)
    assert isinstance(model, MultiTaskNetwork)
    assert model.tasks == ("parity", "half", "turn")
    states = {name: tasks_pool.load_model(name).state_dict() for name in tasks_pool}
    for name, state in states.items():
        plain = model.for_task(name)
        assert isinstance(plain, CifarResNet)
        assert torch.equal(plain.linear.weight, state["linear.weight"])
        assert model.labels[name].task == name
    mean = torch.stack([state["conv1.weight"] for state in states.values()]).mean(0)
    torch.testing.assert_close(model.for_task("turn").conv1.weight, mean)
    assert merge.report["head"] == "tasks"


def test_the_control_is_the_base_with_the_experts_heads(tasks_pool, base) -> None:
    merge = Merge(rule=Mean(), calibration_images=200)
    model = merge.run(tasks_pool)
    ((name, make),) = merge.controls.items()
    assert name == "_pretrained_, experts' heads, batch norm recalibrated"
    control = make()
    for task in model.tasks:
        assert torch.equal(control.for_task(task).conv1.weight, base.conv1.weight)
        assert torch.equal(control.for_task(task).linear.weight, model.for_task(task).linear.weight)
    mixture = copy.deepcopy(base)
    recalibrate_batch_norm(mixture, tasks_pool.images(), images=200)
    assert torch.equal(control.for_task("turn").bn1.running_mean, mixture.bn1.running_mean)


def test_statistics_per_task_are_those_of_each_experts_own_images(tasks_pool, tasks_data) -> None:
    merge = Merge(rule=Mean(), batch_norm="recalibrate_per_task", calibration_images=200)
    model = merge.run(tasks_pool)
    shared = Merge(rule=Mean(), batch_norm="merge").run(tasks_pool)
    for task, data in tasks_data.items():
        own = copy.deepcopy(shared.for_task(task))
        recalibrate_batch_norm(own, data, images=200)
        for key, tensor in own.state_dict().items():
            assert torch.equal(model.for_task(task).state_dict()[key], tensor), key
    first, second = (model.for_task(task) for task in ("parity", "turn"))
    assert first.conv1 is second.conv1
    assert not torch.equal(first.layer3[0].bn2.running_var, second.layer3[0].bn2.running_var)


def test_a_network_of_tasks_is_saved_and_read_back(tasks_pool, tmp_path) -> None:
    model = Merge(rule=Mean(), batch_norm="recalibrate_per_task").run(tasks_pool).eval()
    path = tmp_path / "merged.safetensors"
    tasks_pool.save_model(model, path)
    spec = {"_target_": "fusion.models.CifarResNet", "depth": 8, "in_channels": 1, "width": 0.5}
    again = Checkpoint(path, spec).build().eval()
    images = torch.rand(4, 1, 8, 8)
    for task in model.tasks:
        assert torch.equal(again(images, task=task), model(images, task=task))
        assert again.labels[task] == model.labels[task]
    assert again.for_task("half").conv1.weight is again.for_task("turn").conv1.weight


def test_experts_of_one_label_space_give_a_plain_network(base, peers, train_digits) -> None:
    classes = {name: list("0123456789") for name in ("_pretrained_", *peers)}
    pool = BaseModelPool({"_pretrained_": base, **peers}, classes=classes)
    merge = Merge(rule=Mean())
    model = merge.run(pool)
    assert isinstance(model, CifarResNet)
    mean = torch.stack([p.linear.weight for p in peers.values()]).mean(0)
    torch.testing.assert_close(model.linear.weight, mean)
    assert merge.result_labels(pool) == pool.labels("_pretrained_")


def test_experts_whose_classes_the_base_lacks_bring_their_common_head(net, base) -> None:
    """Three experts of four new classes from a base of ten: one network of four outputs."""
    experts = {f"e{seed}": net(4, seed=seed) for seed in (1, 2, 3)}
    classes = {name: list("wxyz") for name in experts} | {"_pretrained_": list("0123456789")}
    pool = BaseModelPool({"_pretrained_": base, **experts}, classes=classes)
    model = Merge(rule=TaskArithmetic()).run(pool)
    assert isinstance(model, CifarResNet)
    mean = torch.stack([e.linear.weight for e in experts.values()]).mean(0)
    torch.testing.assert_close(model.linear.weight, mean)
    assert model.linear.out_features == 4


def test_a_rule_that_separates_gives_each_task_its_own_network(tasks_pool) -> None:
    model = Merge(rule=EMR(), calibration_images=200).run(tasks_pool)
    first, second = (model.for_task(task) for task in ("parity", "half"))
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    unified = Merge(rule=EMR(per_task=False), calibration_images=200).run(tasks_pool)
    assert unified.for_task("parity").conv1 is unified.for_task("half").conv1


def test_unknown_classes_are_logged_once(base, experts, caplog) -> None:
    with caplog.at_level(logging.INFO, "fusion"):
        Merge(rule=Mean()).run({"_pretrained_": base, **experts})
    assert caplog.text.count("The classes of a, b are unknown") == 1


class Halfway(Rule):
    """A rule of an outsider's: half way from the base to the mean."""

    def merge(self, piece: Piece) -> torch.Tensor:
        return (piece.reference + piece.experts.mean(0)) / 2


def test_a_rule_of_ones_own_is_one_class(base, peers) -> None:
    model = Merge(rule=Halfway()).run({"_pretrained_": base, **peers})
    mean = torch.stack([p.conv1.weight for p in peers.values()]).mean(0)
    torch.testing.assert_close(model.conv1.weight, (base.conv1.weight + mean) / 2)


def test_merging_takes_one_line(base, peers, equal) -> None:
    models = {"_pretrained_": base, **peers}
    by_name = fusion.merge(models, "task_arithmetic", scale=0.5)
    assert equal(by_name, Merge(rule=TaskArithmetic(scale=0.5)).run(models))
    assert isinstance(fusion.merge(list(peers.values())), CifarResNet)  # no base is needed
    weighted = fusion.merge(models, "weighted_average", weights={"p1": 1, "p2": 0, "p3": 0})
    assert torch.equal(weighted.conv1.weight, peers["p1"].conv1.weight)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"method": "ties_mergin"}, "no method 'ties_mergin'; did you mean 'ties_merging'"),
        ({"method": "ties_merging", "threshold": 1}, "'threshold'; here it is called 'density'"),
        ({"method": "task_arithmetic", "scaling_factor": 1}, "here it is called 'scale'"),
        ({"method": "simple_average", "sede": 1}, "did you mean 'seed'"),
        ({"method": "merge"}, "_target_ '???'"),
    ],
)
def test_a_wrong_name_is_a_sentence(peers, call, said) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        fusion.merge(list(peers.values()), **call)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ("experts", {"rule": TaskArithmetic()}, "TaskArithmetic needs a base"),
        ("base", {"rule": Mean()}, "merges experts, and the pool has none"),
        ("all", {"rule": Mean(), "batch_norm": "recalibrate_per_task"}, "needs training images"),
        ("all", {"rule": Mean(), "weights": [1, 2]}, "2 numbers for 3 experts"),
        ("all", {"rule": Mean(), "align": "activations"}, "by activations needs images"),
    ],
)
def test_what_is_missing_is_a_sentence_before_any_work(base, peers, models, options, said) -> None:
    given = {
        "experts": peers,
        "base": {"_pretrained_": base},
        "all": {"_pretrained_": base, **peers},
    }
    with pytest.raises(UserError, match=said):
        Merge(**options).check_pool(BaseModelPool(given[models]))


@pytest.mark.parametrize("wrong", [3, {"rule": 1}, Mean])
def test_a_rule_is_a_rule(wrong) -> None:
    with pytest.raises(UserError, match=r"Merge\.rule is .*; give a Rule, or a mapping"):
        Merge(rule=wrong)


def test_the_table_of_methods_says_what_each_needs() -> None:
    table = fusion.methods().set_index("name")
    assert table.loc["ties_merging", "needs"] == "a pretrained model"
    assert table.loc["simple_average", "needs"] == ""
    assert table.loc["ties_merging", "paper"] == "2306.01708"
    assert "merge" not in table.index
    assert table["summary"].str.len().min() > 20


def test_classes_split_over_the_experts_leave_the_bases_head(base, experts, train_digits) -> None:
    data = {
        "a": ClassSubset(train_digits, [0, 1, 2, 3]),
        "b": ClassSubset(train_digits, [4, 5, 6, 7, 8, 9]),
        "_pretrained_": train_digits,
    }
    pool = BaseModelPool({"_pretrained_": base, **experts}, train_datasets=data)
    merge = Merge(rule=Mean(), calibration_images=100)
    model = merge.run(pool)
    assert torch.equal(model.linear.weight, base.linear.weight)
    assert merge.result_labels(pool).names == tuple("0123456789")
