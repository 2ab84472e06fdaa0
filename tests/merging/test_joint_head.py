"""One head for all classes: exact where features are the experts'; refused without meaning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusion
from fusion.data import ClassSubset
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.merging.joint_head import RIDGE, ClassStatistics, solve_head
from fusion.method.presets import algorithm
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet

TEN = [str(number) for number in range(10)]


def features_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    head = network.linear
    handle = head.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    with torch.no_grad():
        network.eval()(images)
    handle.remove()
    return found[0].double()


def pooled_head(network: nn.Module, parts: list[ClassSubset]) -> torch.Tensor:
    """Weighted ridge regression on the images of all parts together, bias included."""
    rows, targets, weights = [], [], []
    for part in parts:
        images = torch.stack([image for image, _ in part])
        labels = torch.tensor([part.original_labels[label] for _, label in part])
        rows.append(features_of(network, images))
        targets.append(nn.functional.one_hot(labels, 10).double())
        weights.append(torch.full((len(part),), len(part.class_names) / len(part)))
    x, y, w = torch.cat(rows), torch.cat(targets), torch.cat(weights).double()
    w = w / w.sum()
    mean, shares = w @ x, w @ y
    x, y = x - mean, y - shares
    ridge = RIDGE * (w @ x.square()).mean()
    design = torch.cat([w.sqrt()[:, None] * x, ridge.sqrt() * torch.eye(x.shape[1]).double()])
    wanted = torch.cat([w.sqrt()[:, None] * y, torch.zeros(x.shape[1], 10).double()])
    weight = torch.linalg.lstsq(design, wanted).solution.mT
    return torch.cat([weight, (shares - weight @ mean)[:, None]], 1)


def head_of(network: nn.Module) -> torch.Tensor:
    return torch.cat([network.linear.weight, network.linear.bias[:, None]], 1).double()


@pytest.mark.parametrize(
    ("first", "second"), [((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), ((0, 1, 2, 3, 4, 7), range(4, 10))]
)
def test_experts_of_one_body_get_the_head_of_all_images(
    base, net, train_digits, tmp_path, first, second
) -> None:
    """From cards alone, for label spaces that overlap or not."""
    few = train_digits.select(torch.arange(300))
    data = {"a": ClassSubset(few, list(first)), "b": ClassSubset(few, list(second))}
    experts: dict[str, CifarResNet] = {}
    for seed, name in enumerate(data):
        experts[name] = net(len(data[name].class_names), seed=seed)
        own = experts[name].state_dict()
        body = {k: t for k, t in base.state_dict().items() if not k.startswith("linear")}
        experts[name].load_state_dict(own | body)
    owners = BaseModelPool(experts, train_datasets=data)
    cards = {name: fusion.write_card(owners, name, tmp_path / name) for name in data}
    server = BaseModelPool(experts, cards=cards)
    merged = fusion.merge(server, "simple_average", head="joint", batch_norm="merge", plot=False)
    assert merged.linear.out_features == 10
    wanted = pooled_head(experts["a"], list(data.values()))
    torch.testing.assert_close(head_of(merged), wanted, rtol=1e-3, atol=1e-4)


def test_cards_of_the_merged_network_make_its_head_exact(pool, train_digits, tmp_path) -> None:
    """The second round: each owner measures what the server merged; its body stays as it is."""
    few = train_digits.select(torch.arange(300))
    data = {"a": ClassSubset(few, [0, 1, 2, 3]), "b": ClassSubset(few, [4, 5, 6, 7, 8, 9])}
    merged = fusion.merge(
        BaseModelPool(pool, train_datasets=data), "regmean", head="joint", folded=True, plot=False
    )
    classes = dict.fromkeys(data, TEN)
    copies = dict.fromkeys(data, merged)
    owners = BaseModelPool(copies, train_datasets=data, classes=classes)
    cards = {name: fusion.write_card(owners, name, tmp_path / name) for name in data}
    second = fusion.merge(
        BaseModelPool(copies, cards=cards),
        "simple_average",
        head="joint",
        batch_norm="merge",
        plot=False,
    )
    wanted = pooled_head(merged, list(data.values()))
    torch.testing.assert_close(head_of(second), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(head_of(second), head_of(merged), atol=1e-2)
    state = merged.state_dict()
    for key, tensor in second.state_dict().items():
        if not key.startswith("linear"):
            torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-6)


def test_a_head_without_a_bias_is_solved_without_one() -> None:
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double()
    labels = (rows[:, 0] > 0).long()
    inputs = torch.cat([rows, torch.ones(200, 1)], 1)
    statistics = ClassStatistics(
        inputs.mT @ inputs / 200,
        nn.functional.one_hot(labels, 2).double().mT @ inputs / 200,
        LabelSpace.of(["no", "yes"]),
    )
    weight, bias = solve_head([statistics], LabelSpace.of(["yes", "no"]), bias=False, ridge=1e-10)
    assert bias is None
    wanted = torch.linalg.lstsq(rows, nn.functional.one_hot(1 - labels, 2).double()).solution.mT
    torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-8)


def test_a_class_without_images_is_refused(experts, train_digits) -> None:
    few = train_digits.select(torch.arange(300))
    data = {"a": ClassSubset(few, [0, 1, 2]), "b": ClassSubset(few, [4, 5, 6, 7, 8, 9])}
    classes = {"a": TEN[:4], "b": TEN[4:]}
    pool = BaseModelPool(experts, train_datasets=data, classes=classes)
    with pytest.raises(UserError, match="there are none of 3; leave these out of the classes"):
        fusion.merge(pool, "simple_average", head="joint", batch_norm="merge", plot=False)


def test_a_head_that_is_no_linear_layer_is_refused(train_digits) -> None:
    one = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    data = {"a": train_digits, "b": train_digits}
    pool = BaseModelPool({"a": one, "b": copy.deepcopy(one)}, train_datasets=data)
    with pytest.raises(UserError, match="solves one linear layer, and the head of Sequential is"):
        algorithm("simple_average", head="joint").check_pool(pool)


def test_classes_that_nobody_knows_are_refused(experts) -> None:
    with pytest.raises(UserError, match="head=joint needs the classes of every expert"):
        fusion.merge(experts, "simple_average", head="joint", plot=False)
