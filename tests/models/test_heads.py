"""The head is what differs in its rows, in whatever network, and gives them up by class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn

from fusion.errors import UserError
from fusion.models import CifarResNet, SeparableResNet, head_names, slice_head

KEPT = [4, 5, 7, 9]


def build(name: str, num_classes: int) -> nn.Module:
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    with torch.device("meta"):
        return torchvision.models.get_model(name, num_classes=num_classes, **options)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("resnet18", ["fc"]),
        ("vgg11_bn", ["classifier.6"]),
        ("densenet121", ["classifier"]),
        ("squeezenet1_1", ["classifier.1"]),  # a convolution
        ("mobilenet_v3_small", ["classifier.3"]),
        ("googlenet", ["aux1.fc2", "aux2.fc2", "fc"]),
    ],
)
def test_the_head_of_torchvision_networks(name: str, modules: list[str]) -> None:
    ten, four = build(name, 10), build(name, 4)
    expected = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    assert set(head_names(ten, four)) == expected
    assert set(head_names(four.state_dict(), ten.state_dict())) == expected
    state = {key: torch.zeros(value.shape) for key, value in ten.state_dict().items()}
    fitted = slice_head(state, like=four, rows=KEPT)
    assert all(fitted[key].shape == value.shape for key, value in four.state_dict().items())


@pytest.mark.parametrize("network", [SeparableResNet, CifarResNet])
def test_sliced_logits_are_the_logits_of_the_kept_classes(
    network: Callable[..., nn.Module],
) -> None:
    images = torch.tensor(load_digits().images[:8], dtype=torch.float32)[:, None] / 16
    base = network(num_classes=10, in_channels=1, width=0.25)
    expert = network(num_classes=4, in_channels=1, width=0.25)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    expert.load_state_dict(slice_head(base.state_dict(), like=expert, rows=KEPT))
    base.eval()
    expert.eval()
    torch.testing.assert_close(expert(images), base(images)[:, KEPT])
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_networks_with_equally_many_classes_have_no_head_to_find() -> None:
    base = CifarResNet(8)
    state = base.state_dict()
    assert head_names(base, CifarResNet(8)) == ()
    assert slice_head(state, like=base, rows=range(10)).keys() == state.keys()


def test_a_named_head_can_be_reordered() -> None:
    base = CifarResNet(8)
    state = base.state_dict()
    order = list(reversed(range(10)))
    with pytest.raises(UserError, match=r"name its tensors: head="):
        slice_head(state, like=base, rows=order)
    head = ("linear.weight", "linear.bias")
    turned = slice_head(state, like=base, rows=order, head=head)
    assert torch.equal(turned["linear.weight"], state["linear.weight"].flip(0))
    assert torch.equal(turned["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (CifarResNet(8), CifarResNet(14), "has layer1.1.conv1.weight, .* more besides"),
        (CifarResNet(14), CifarResNet(8), "lacks layer1.1.conv1.weight"),
        (CifarResNet(8), CifarResNet(8, in_channels=1), r"conv1.weight is \(16, 3, 3, 3\)"),
    ],
)
def test_another_architecture_is_refused(first: nn.Module, second: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        head_names(first, second)


def test_two_numbers_of_rows_are_not_one_head() -> None:
    narrow = {"stem": torch.zeros(16, 3), "fc.bias": torch.zeros(10)}
    wide = {"stem": torch.zeros(32, 3), "fc.bias": torch.zeros(10)}
    assert head_names(narrow, wide) == ("stem",)
    with pytest.raises(UserError, match=r"stem has 16 rows, fc\.bias has 10 rows"):
        head_names(narrow, {**wide, "fc.bias": torch.zeros(4)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2, 10], "linear.weight has rows 0 to 9.*no row 10"),
        ([0, 1, 2, -1], "no row -1"),
        ([0, 1, 2, 2], "twice"),
        ([0, 1, 2], "3 rows are asked for, the network to fill has 4"),
    ],
)
def test_rows_that_cannot_be_taken(rows: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slice_head(CifarResNet(8).state_dict(), like=CifarResNet(8, num_classes=4), rows=rows)


def test_a_named_head_must_exist_and_be_whole() -> None:
    state, like = CifarResNet(8).state_dict(), CifarResNet(8, num_classes=4)
    with pytest.raises(UserError, match=r"no fc\.weight"):
        slice_head(state, like=like, rows=KEPT, head=["fc.weight"])
    with pytest.raises(UserError, match=r"linear\.bias must be among"):
        slice_head(state, like=like, rows=KEPT, head=["linear.weight"])
