"""The head is found from the graph: the last layer of each output, with what follows it."""

from __future__ import annotations

import logging

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from fusion.errors import UserError
from fusion.models import CifarResNet, SeparableResNet, find_head, resize_head, select_rows
from fusion.models.head import Head


def build(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options)


PLAIN = {"init_weights": False}
BARE = {"weights": None, "weights_backbone": None}


@pytest.mark.parametrize(
    ("name", "options", "modules"),
    [
        ("resnet18", {}, ["fc"]),
        ("vgg11_bn", {}, ["classifier.6"]),
        ("densenet121", {}, ["classifier"]),
        ("squeezenet1_1", {}, ["classifier.1"]),  # a 1×1 convolution, pooled afterwards
        ("mobilenet_v3_small", {}, ["classifier.3"]),
        ("googlenet", PLAIN, ["aux1.fc2", "aux2.fc2", "fc"]),  # outputs of the training mode
        ("fcn_resnet50", {**BARE, "aux_loss": True}, ["classifier.4", "aux_classifier.4"]),
        (
            "lraspp_mobilenet_v3_large",  # its output is a sum of two layers
            BARE,
            ["classifier.low_classifier", "classifier.high_classifier"],
        ),
        ("r3d_18", {}, ["fc"]),
    ],
)
def test_the_head_of_torchvision_networks(
    name: str, options: dict[str, object], modules: list[str]
) -> None:
    expected = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    assert set(find_head(build(name, **options)).tensors) == expected


def test_a_detector_is_run_where_it_cannot_be_traced() -> None:
    model = torchvision.models.get_model("ssdlite320_mobilenet_v3_large", **BARE, num_classes=3)
    head = find_head(model, torch.rand(1, 3, 64, 64))
    assert {key.split(".")[1] for key in head.tensors} == {
        "classification_head",
        "regression_head",
    }
    assert len(head.tensors) == 2 * 2 * 6  # weight and bias, two kinds of output, six scales


def test_two_heads_of_one_size_are_told_apart_from_the_body_by_the_graph() -> None:
    """A hidden layer of the head's very shape stays in the body."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)  # registered first
            self.scale = nn.Parameter(torch.ones(8))
            self.hidden = nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.out(F.relu(self.hidden(x)))) * self.scale

    head = find_head(Net())
    assert "scale" in head
    assert "norm.running_var" in head
    assert {key.partition(".")[0] for key in head.tensors} == {"out", "norm", "scale"}


def test_a_weight_used_by_a_function_is_a_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 4, 3)
            self.directions = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.body(x).mean((2, 3)), F.normalize(self.directions))

    assert find_head(Net()).tensors == ("directions",)


class Branching(nn.Module):
    """Looks at its data: no symbolic trace can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.body, self.spare = nn.Linear(4, 3), nn.Conv2d(1, 4, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x).mean((2, 3))
        return self.out(x if x.sum() > 0 else -x)


def test_an_untraceable_network_is_run_on_an_example() -> None:
    assert find_head(Branching(), torch.rand(1, 1, 8, 8)).tensors == ("out.weight", "out.bias")


def test_without_an_example_the_assumption_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fusion"):
        assert find_head(Branching()).tensors == ("spare.weight", "spare.bias")
    assert "taken to be 'spare', the last layer that was registered" in caplog.text


def test_a_head_can_be_named() -> None:
    model = build("vgg11_bn")
    assert len(find_head(model, named=["classifier"]).tensors) == 6
    assert find_head(model, named=["classifier.6.bias"]).tensors == ("classifier.6.bias",)
    with pytest.raises(UserError, match="called 'clasifier'; did you mean 'classifier'"):
        find_head(model, named=["clasifier"])
    with pytest.raises(UserError, match="give a list of modules"):
        find_head(model, named="fc")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no convolution or linear layer"):
        find_head(nn.ReLU())


@pytest.mark.parametrize("network", [SeparableResNet, CifarResNet])
def test_selected_rows_give_the_logits_of_their_classes(network, test_digits) -> None:
    images = test_digits.normalise(test_digits.images[:8])
    base = network(num_classes=10, in_channels=1, width=0.25).eval()
    expert = network(num_classes=4, in_channels=1, width=0.25).eval()
    state = base.state_dict()
    rows = select_rows(state, find_head(base), [4, 5, 7, 9], classes=10)
    expert.load_state_dict({**state, **rows})
    torch.testing.assert_close(expert(images), base(images)[:, [4, 5, 7, 9]])


def test_rows_that_are_not_there_are_refused() -> None:
    net = CifarResNet(8, 10)
    head = find_head(net)
    for rows in ([10], [1, 1], [-1]):
        with pytest.raises(UserError, match="name existing rows, each once"):
            select_rows(net.state_dict(), head, rows, classes=10)
    with pytest.raises(UserError, match=r"linear.weight has 10 rows and the head 5.*head=fresh"):
        select_rows(net.state_dict(), head, [1], classes=5)
    bare = {"temperature": torch.tensor(2.0)}
    assert select_rows(bare, Head(("temperature",)), [1], classes=5) == bare


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Linear(3, 4), "out_features"),
        (nn.Conv2d(3, 4, 1), "out_channels"),
        (nn.BatchNorm2d(4), "num_features"),
    ],
)
def test_a_head_is_given_its_new_size(module: nn.Module, size: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), module)
    own = net[1].state_dict(prefix="1.")
    state = {key: tensor[:2].clone() if tensor.ndim else tensor for key, tensor in own.items()}
    resize_head(net, state)
    net.load_state_dict(state, strict=False)
    assert getattr(net[1], size) == 2
    assert net[1].weight.shape[0] == net[1].bias.shape[0] == 2
