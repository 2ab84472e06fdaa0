from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fusion.data import ImageTensors
from fusion.errors import UserError
from fusion.models import CifarResNet
from fusion.training import recalibrate_batch_norm
from fusion.training.channel_statistics import (
    channel_statistics,
    measure_channels,
    pre_activations,
)
from fusion.training.repair import HELD_BYTES, repair

IMAGES = 300


class Plain(nn.Module):
    """Residual and without any norm: convolutions with and without bias, one transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.hidden = nn.Linear(4, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.second(x))
        x = torch.relu(self.up(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def resnet() -> nn.Module:
    return CifarResNet(8, in_channels=1, width=0.5, shortcut="B")


def resnet_without_affine() -> nn.Module:
    model = resnet()
    model.bn1 = nn.BatchNorm2d(8, affine=False)
    return model


def two_and_mean(make: Callable[[], nn.Module]) -> tuple[list[nn.Module], nn.Module]:
    members = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            member = make().eval()
            for module in member.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
                    if module.affine:
                        nn.init.normal_(module.weight)
                        nn.init.normal_(module.bias)
            members.append(member)
    merged = copy.deepcopy(members[0])
    other = members[1].state_dict()
    state = {
        key: (value + other[key]) / 2 if value.is_floating_point() else value
        for key, value in merged.state_dict().items()
    }
    merged.load_state_dict(state)
    return members, merged


@pytest.mark.parametrize("make", [resnet, Plain])
@pytest.mark.parametrize("batch_size", [64, IMAGES])
def test_every_channel_has_the_interpolated_statistics(make, batch_size, train_digits) -> None:
    members, merged = two_and_mean(make)
    data = train_digits.select(torch.arange(IMAGES))
    repair(merged, members, data, weights=[0.3, 0.7], batch_size=batch_size)
    names = dict.fromkeys(pre_activations(merged), 1)
    sample = data.normalise(data.images)
    with torch.no_grad():
        ours = measure_channels(merged, names, iter([sample]))
        theirs = [measure_channels(member, names, iter([sample])) for member in members]
    for name in names:
        mean = 0.3 * theirs[0][name].mean + 0.7 * theirs[1][name].mean
        deviation = 0.3 * theirs[0][name].variance.sqrt() + 0.7 * theirs[1][name].variance.sqrt()
        torch.testing.assert_close(ours[name].variance.sqrt(), deviation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[name].mean, mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [resnet, Plain])
def test_the_merge_needed_it(make, train_digits) -> None:
    """The law above says something: averaging alone loses variance."""
    members, merged = two_and_mean(make)
    last = pre_activations(merged)[-1]
    sample = train_digits.normalise(train_digits.images[:IMAGES])
    with torch.no_grad():
        ours = measure_channels(merged, {last: 1}, iter([sample]))[last]
        theirs = measure_channels(members[0], {last: 1}, iter([sample]))[last]
    assert ours.variance.mean() < 0.7 * theirs.variance.mean()


class Counter:
    """Counts the images that enter each of some networks."""

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks
        self.images = [0] * len(networks)
        for number, network in enumerate(networks):
            network.register_forward_pre_hook(partial(self._count, number))

    def _count(self, number: int, network: nn.Module, args: tuple[Tensor]) -> None:
        self.images[number] += len(args[0])


@pytest.mark.parametrize("make", [resnet, Plain])
def test_each_network_sees_the_images_once(make, train_digits) -> None:
    members, merged = two_and_mean(make)
    counter = Counter(merged, *members)
    repair(merged, members, train_digits.select(torch.arange(IMAGES)), batch_size=64)
    # The merged network runs on one image more, which tells the order of its layers.
    assert counter.images == [IMAGES + 1, IMAGES, IMAGES]


def test_members_are_measured_once_for_all_points_of_a_line(train_digits, equal) -> None:
    members, merged = two_and_mean(resnet)
    data = train_digits.select(torch.arange(IMAGES))
    options = {"images": 200, "batch_size": 64, "seed": 3}
    measured = [channel_statistics(member, data, **options) for member in members]
    counter = Counter(*members)
    for weights in ([0.3, 0.7], [0.5, 0.5]):
        points = copy.deepcopy(merged), copy.deepcopy(merged)
        repair(points[0], measured, data, weights=weights, **options)
        assert counter.images == [0, 0]
        repair(points[1], members, data, weights=weights, **options)
        assert equal(*points)
        counter.images = [0, 0]


@pytest.mark.parametrize("make", [resnet, Plain, "twice"])
def test_what_is_held_has_no_influence(make, train_digits, equal) -> None:
    """A pass per layer gives the same bits; memory decides how many layers share one."""
    make = Twice if make == "twice" else make
    members, merged = two_and_mean(make)
    data = train_digits.select(torch.arange(IMAGES))
    passes = []
    repaired = []
    for held_bytes in (HELD_BYTES, 2 * IMAGES * 8 * 8 * 4, 0):
        network = copy.deepcopy(merged)
        counter = Counter(network)
        repair(network, members, data, batch_size=64, held_bytes=held_bytes)
        passes.append((counter.images[0] - 1) // IMAGES)
        repaired.append(network)
    assert passes[0] < passes[2] == len(pre_activations(merged))
    assert passes[0] <= passes[1] <= passes[2]
    assert all(equal(repaired[0], other) for other in repaired[1:])


def test_threads_end_with_the_pass(train_digits) -> None:
    """Also where the network fails half-way, which is told as it is."""

    class Failing(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.second(torch.relu(self.first(x))))
            if 1 < len(x) < 64:  # the last batch
                raise RuntimeError("out of order")
            return self.head(torch.relu(self.hidden(torch.relu(self.up(x)).mean((2, 3)))))

    members, merged = two_and_mean(Plain)
    failing = Failing().eval()
    failing.load_state_dict(merged.state_dict())
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of order"):
        repair(failing, members, train_digits.select(torch.arange(IMAGES)), batch_size=64)
    assert threading.active_count() == before
    assert not any(module._forward_hooks for module in failing.modules())
    repair(merged, members, train_digits, images=100, batch_size=50)
    assert threading.active_count() == before


class Twice(Plain):
    """Runs one of its layers a second time."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(2 * torch.relu(self.second(x))))
        x = torch.relu(self.up(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


@pytest.mark.parametrize("make", [resnet, resnet_without_affine, Plain, Twice])
def test_a_member_repaired_toward_itself_computes_the_same(make, train_digits) -> None:
    members, _ = two_and_mean(make)
    member = members[0]
    sample = train_digits.normalise(train_digits.images[:IMAGES])
    data = train_digits.select(torch.arange(IMAGES))
    repaired = copy.deepcopy(member)
    if make is resnet_without_affine:  # its first norm has nothing to hold its own statistics
        repair(repaired, [copy.deepcopy(member)], data, batch_size=64)
        member = copy.deepcopy(repaired)
    repair(repaired, [member], data, batch_size=64)
    with torch.no_grad():
        torch.testing.assert_close(repaired(sample), member(sample), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.half)])
def test_any_precision(dtypes, train_digits) -> None:
    members, merged = two_and_mean(resnet)
    data = train_digits.select(torch.arange(IMAGES))
    exact = copy.deepcopy(merged)
    repair(exact, members, data)
    for member, dtype in zip(members, dtypes, strict=True):
        member.to(dtype)
    merged.to(dtypes[0])
    repair(merged, members, data)
    assert {p.dtype for p in merged.parameters()} == {dtypes[0]}
    sample = data.normalise(data.images)
    with torch.no_grad():
        # Eight bits of each of a dozen layers, in members and mean.
        error = (merged.float()(sample) - exact(sample)).norm() / exact(sample).norm()
    assert error < 0.05


def test_a_network_that_casts_and_its_buffers_are_left_as_they_are(train_digits) -> None:
    class Casting(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net.bfloat16()
            self.register_buffer("offset", torch.tensor([0.1307], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x - self.offset).bfloat16()).float()

    members, merged = two_and_mean(resnet)
    networks = [Casting(network) for network in (merged, *members)]
    data = train_digits.select(torch.arange(IMAGES))
    assert repair(networks[0], networks[1:], data) == 9
    assert recalibrate_batch_norm(networks[0], data) == IMAGES
    for network in networks:
        assert torch.equal(network.offset, torch.tensor([0.1307], dtype=torch.float64))


def test_members_modes_and_the_last_layer_stay(train_digits, equal) -> None:
    members, merged = two_and_mean(resnet)
    before = [copy.deepcopy(member) for member in members]
    head = copy.deepcopy(merged.linear.state_dict())
    merged.train()
    assert repair(merged, members, train_digits, images=100) == 9
    assert merged.training
    assert all(equal(one, other) for one, other in zip(members, before, strict=True))
    assert all(torch.equal(head[key], value) for key, value in merged.linear.state_dict().items())


def test_without_a_bias_the_deviation_alone_is_repaired(train_digits) -> None:
    def make() -> nn.Module:
        model = Plain()
        model.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        return model

    members, merged = two_and_mean(make)
    keys = merged.state_dict().keys()
    repair(merged, members[:1], train_digits.select(torch.arange(IMAGES)), batch_size=IMAGES)
    sample = train_digits.normalise(train_digits.images[:IMAGES])
    with torch.no_grad():
        ours = measure_channels(merged, {"second": 1}, iter([sample]))["second"]
        goal = measure_channels(members[0], {"second": 1}, iter([sample]))["second"]
    torch.testing.assert_close(ours.variance, goal.variance, rtol=1e-4, atol=1e-6)
    assert merged.state_dict().keys() == keys


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"members": []}, "members: none"),
        ({"weights": [1.0]}, "one number"),
        ({"weights": [0.0, 0.0]}, "one number"),
        ({"members": [{}]}, "number 0 has no 'conv1'|number 0 has no 'bn1'"),
        ({"images": 1}, "images: 1"),
        ({"dataset": "one image"}, "one image has no variance"),
    ],
)
def test_what_cannot_be(options, says, train_digits: ImageTensors) -> None:
    members, merged = two_and_mean(resnet)
    if options.get("dataset") == "one image":
        options = {"data": train_digits.select(torch.arange(1))}
    with pytest.raises(UserError, match=says):
        repair(merged, **{"members": members, "data": train_digits, **options})
