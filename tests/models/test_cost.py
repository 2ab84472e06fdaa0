"""Multiplications are those that can be counted by hand; what tasks share counts once."""

from __future__ import annotations

import torch
from torch import nn

from fusion.labels import LabelSpace
from fusion.models import CifarResNet, CutNetwork, MultiTaskNetwork, cost_of
from fusion.taskpool import Ensemble
from fusion.weights import tensors_of

SHAPE = (3, 16, 16)


def of_tasks(outputs: dict[str, int], *, apart: tuple[str, ...] = ()) -> MultiTaskNetwork:
    body = CifarResNet(8)
    own = {}
    for task, n in outputs.items():
        state = tensors_of(CifarResNet(8, num_classes=n))
        own[task] = {k: v for k, v in state.items() if k.startswith(("linear", *apart))}
    return MultiTaskNetwork.assemble(body, own)


def test_a_convolution_and_a_linear_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(6 * 25, 7)
    )
    cost = cost_of(model, (4, 5, 5))
    assert cost.multiply_adds == 25 * 6 * 2 * 9 + 6 * 25 * 7
    assert cost.parameters == 6 * 2 * 9 + 6 + 6 * 25 * 7 + 7


def test_tasks_that_share_their_body_cost_it_once() -> None:
    one = cost_of(CifarResNet(8, num_classes=10), SHAPE)
    both = cost_of(of_tasks({"a": 10, "b": 4}), SHAPE)
    assert both.multiply_adds == one.multiply_adds + 64 * 4
    assert both.parameters == one.parameters + 64 * 4 + 4


def test_tasks_with_running_statistics_of_their_own_cost_a_pass_each() -> None:
    a, b = (cost_of(CifarResNet(8, num_classes=n), SHAPE) for n in (10, 4))
    both = cost_of(of_tasks({"a": 10, "b": 4}, apart=("bn1.running",)), SHAPE)
    assert both.multiply_adds == a.multiply_adds + b.multiply_adds
    assert both.parameters < a.parameters + b.parameters


def test_an_ensemble_costs_what_its_members_cost() -> None:
    members = {"a": CifarResNet(8, num_classes=10), "b": CifarResNet(8, num_classes=4)}
    labels = {name: LabelSpace.of(range(4)) for name in members}
    together = cost_of(Ensemble(members, labels, {n: n for n in members}), SHAPE)
    apart = [cost_of(model, SHAPE) for model in members.values()]
    assert together.multiply_adds == sum(cost.multiply_adds for cost in apart)
    assert together.parameters == sum(cost.parameters for cost in apart)


def test_no_value_is_read_and_the_network_stays_as_it_is() -> None:
    model = CifarResNet(8).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cost_of(model, SHAPE)
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_the_trunk_of_networks_that_are_cut_is_counted_once() -> None:
    network = CifarResNet(8)
    one, head = cost_of(network, SHAPE), 64 * 10
    cut = CutNetwork(network, "layer3.0.conv1")
    state = tensors_of(cut)
    tail = {key: tensor for key, tensor in state.items() if key not in cut.cut.trunk}
    both = cost_of(MultiTaskNetwork.assemble(cut, {"a": tail, "b": {**tail}}), SHAPE)
    behind = 4 * 4 * 9 * (32 * 64 + 64 * 64) + head
    assert both.multiply_adds == one.multiply_adds + behind
