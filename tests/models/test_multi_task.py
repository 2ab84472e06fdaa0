"""One body, several heads: each task has a whole network, and they share the body."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.models import CifarResNet, MultiTaskNetwork, find_head
from fusion.training import recalibrate_batch_norm
from fusion.weights import tensors_of


@pytest.fixture
def parts(base, experts):
    """The base and the heads of two experts."""
    head = find_head(base).tensors
    own = {name: {k: e.state_dict()[k] for k in head} for name, e in experts.items()}
    return base, own


def test_each_task_has_the_body_with_its_own_head(parts, experts, test_digits) -> None:
    base, own = parts
    model = MultiTaskNetwork.assemble(base, own).eval()
    images = test_digits.normalise(test_digits.images[:16])
    assert model.tasks == ("a", "b")
    for name, expert in experts.items():
        by_hand = copy.deepcopy(expert)
        state = {**base.state_dict(), **own[name]}
        by_hand.load_state_dict(state)
        by_hand.eval()
        plain = model.for_task(name)
        assert type(plain) is type(base)
        assert torch.equal(model(images, task=name), by_hand(images))
        by_hand.load_state_dict(plain.state_dict())  # what a script without this package does
        assert plain.linear.out_features == expert.linear.out_features


def test_the_body_is_shared_and_the_input_left_alone(parts, equal, net) -> None:
    base, own = parts
    model = MultiTaskNetwork.assemble(base, own)
    first, second = (model.for_task(task) for task in model.tasks)
    assert first.conv1 is second.conv1
    assert first.linear is not second.linear
    assert set(model.own_keys()) == {"linear.weight", "linear.bias"}
    whole = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for n in model.networks for p in n.linear.parameters())
    assert whole == heads + sum(
        p.numel() for name, p in base.named_parameters() if not name.startswith("linear")
    )
    with torch.no_grad():
        first.conv1.weight.zero_()
    assert not second.conv1.weight.any()
    assert equal(base, net())


def test_copies_and_moves_keep_the_body_shared(parts) -> None:
    model = MultiTaskNetwork.assemble(*parts)
    for other in (copy.deepcopy(model), copy.deepcopy(model).double()):
        first, second = (other.for_task(task) for task in other.tasks)
        assert first.conv1.weight is second.conv1.weight
        assert first.bn1.running_mean is second.bn1.running_mean


def test_tasks_may_share_one_head(parts) -> None:
    base, own = parts
    model = MultiTaskNetwork.assemble(base, {"a": own["a"], "also": own["a"], "b": own["b"]})
    assert model.for_task("a") is model.for_task("also")
    assert model.for_task("a").linear is not model.for_task("b").linear


def test_running_statistics_may_be_each_tasks_own(parts, train_digits) -> None:
    base, own = parts
    state = base.state_dict()
    norms = {key: state[key].clone() for key in state if "running" in key or "tracked" in key}
    mine = {
        task: {**head, **{k: t.clone() for k, t in norms.items()}} for task, head in own.items()
    }
    model = MultiTaskNetwork.assemble(base, mine)
    first, second = (model.for_task(task) for task in model.tasks)
    assert first.bn1 is not second.bn1
    assert first.bn1.weight is second.bn1.weight
    recalibrate_batch_norm(first, train_digits, images=200)
    assert torch.equal(second.bn1.running_mean, base.bn1.running_mean)
    assert not torch.equal(first.bn1.running_mean, base.bn1.running_mean)


def test_a_nested_head_is_separated_from_its_container() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=4)
    head = find_head(model).tensors
    own = {task: {key: torch.randn(n, *model.state_dict()[key].shape[1:]) for key in head}
           for task, n in (("x", 3), ("y", 4))}  # fmt: skip
    both = MultiTaskNetwork.assemble(model, own)
    x, y = (both.for_task(task) for task in both.tasks)
    assert x.classifier[0] is y.classifier[0]
    assert x.classifier[3] is not y.classifier[3]
    assert both.eval()(torch.zeros(1, 3, 32, 32), task="x").shape == (1, 3)


def test_a_task_must_be_named_where_there_are_several(parts) -> None:
    base, own = parts
    model = MultiTaskNetwork.assemble(base, own, {"a": LabelSpace.of(["x"])}).eval()
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UserError, match=r"say which: model\(images, task='a'\)"):
        model(images)
    with pytest.raises(UserError, match="no task 'c'"):
        model(images, task="c")
    assert model.labels["b"] is None
    only = MultiTaskNetwork({"a": base}).eval()
    assert torch.equal(only(images), base(images))
    with pytest.raises(UserError, match="give at least one"):
        MultiTaskNetwork({})
    assert isinstance(only, nn.Module)


def test_the_outputs_of_all_tasks_are_those_of_each_from_one_pass() -> None:
    body = CifarResNet(8).eval()
    own = {
        task: {k: v for k, v in tensors_of(CifarResNet(8, num_classes=n)).items() if "linear" in k}
        for task, n in {"a": 3, "b": 5}.items()
    }
    model = MultiTaskNetwork.assemble(body, own).eval()
    assert model.own_layer() == "linear"
    passes: list[object] = []
    model.networks[0].conv1.register_forward_hook(lambda *_: passes.append(None))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = model.outputs(images)
    assert len(passes) == 1
    for task, output in found.items():
        assert torch.equal(output, model(images, task=task))


def test_tasks_that_differ_in_more_than_a_layer_run_apart() -> None:
    body = CifarResNet(8).eval()
    own = {}
    for task in ("a", "b"):
        state = tensors_of(CifarResNet(8, num_classes=3))
        own[task] = {k: v + 1 for k, v in state.items() if k.startswith(("linear", "bn1.bias"))}
    model = MultiTaskNetwork.assemble(body, own).eval()
    assert model.own_layer() is None
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for task, output in model.outputs(images).items():
        assert torch.equal(output, model(images, task=task))


def test_in_training_a_shared_body_sees_images_of_all_tasks_as_one_batch(
    parts, test_digits
) -> None:
    base, own = parts
    model = MultiTaskNetwork.assemble(base, own).train()
    images = test_digits.normalise(test_digits.images[:48])
    batches = {"b": images[:32] * 2 + 1, "a": images[32:]}  # of different brightness
    mixture = copy.deepcopy(model.for_task("a"))
    together = model(batches)
    assert list(together) == ["b", "a"]
    expected = mixture(torch.cat(list(batches.values())))
    assert torch.equal(together["a"], expected[32:])
    assert together["b"].shape == (32, model.for_task("b").linear.out_features)
    buffers = dict(model.for_task("b").named_buffers())
    assert buffers["bn1.num_batches_tracked"] == mixture.bn1.num_batches_tracked
    for name, buffer in mixture.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_tasks_with_their_own_running_statistics_see_their_own_images_alone(
    parts, test_digits
) -> None:
    base, own = parts
    norms = {
        key: value
        for key, value in base.state_dict().items()
        if "running" in key or "num_batches" in key
    }
    own = {
        task: {**state, **{k: v.clone() for k, v in norms.items()}} for task, state in own.items()
    }
    model = MultiTaskNetwork.assemble(base, own).train()
    images = test_digits.normalise(test_digits.images[:48])
    batches = {"a": images[:32] * 2 + 1, "b": images[32:]}
    alone = {task: copy.deepcopy(model.for_task(task)) for task in batches}
    together = model(batches)
    for task, network in alone.items():
        assert torch.equal(together[task], network(batches[task]))
        mine = dict(model.for_task(task).named_buffers())
        assert all(torch.equal(mine[name], buffer) for name, buffer in network.named_buffers())


def test_images_of_different_size_pass_one_task_after_another(parts, test_digits) -> None:
    base, own = parts
    model = MultiTaskNetwork.assemble(base, own).eval()
    images = test_digits.normalise(test_digits.images[:8])
    larger = nn.functional.interpolate(images, size=12)
    together = model({"a": images, "b": larger})
    assert torch.equal(together["a"], model(images, task="a"))
    assert torch.equal(together["b"], model(larger, task="b"))
