"""Zipping from end to end: copies, other orders, tails, budgets, files."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import fusion
from fusion.alignment import apply_permutation, permutation_spec, random_permutation
from fusion.data import ClassSubset, ImageTensors
from fusion.errors import UserError
from fusion.export import export
from fusion.method import GitReBasin, ZipIt
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.modelpool.network_file import save_network
from fusion.models import CutNetwork, MultiTaskNetwork, cost_of
from fusion.training import recalibrate_batch_norm

BASES = ("zip", "cca", "permutation")


class Structured(nn.Module):
    """Sums, a concatenation, and grouped and depthwise convolutions, in ``order``."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        self.order = order
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.parts = nn.ModuleList(getattr(self, f"_{name}")() for name in order)
        self.head = nn.Linear(12, 4)

    @staticmethod
    def _residual() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12),
        )  # fmt: skip

    @staticmethod
    def _grouped() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 12, 1), nn.BatchNorm2d(12),
        )  # fmt: skip

    @staticmethod
    def _depthwise() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12),
        )  # fmt: skip

    @staticmethod
    def _concatenation() -> nn.Module:
        return nn.ModuleDict({
            "grow": nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3, padding=1)),
            "shrink": nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 12, 1)),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for name, part in zip(self.order, self.parts, strict=True):
            if name == "concatenation":
                x = part["shrink"](torch.cat([x, part["grow"](x)], 1))
            else:
                x = (x + part(x)).relu()
        return self.head(x.mean((2, 3)))


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: Structured(("depthwise", "residual", "depthwise")),
    "concatenation": lambda: Structured(("concatenation", "residual", "concatenation")),
    "grouped": lambda: Structured(("grouped", "grouped")),
    "all": lambda: Structured(("grouped", "concatenation", "depthwise", "residual")),
    "DenseNet": lambda: models.DenseNet(8, (2, 2), 8, num_classes=4),
}


@pytest.fixture(scope="module")
def data(train_digits) -> dict[str, ClassSubset]:
    few = train_digits.select(torch.arange(300))
    return {"a": ClassSubset(few, (0, 1, 2, 3)), "b": ClassSubset(few, (4, 5, 6, 7, 8, 9))}


@pytest.fixture(scope="module")
def images(train_digits) -> Tensor:
    return torch.stack([train_digits[i][0] for i in range(300, 330)])


@pytest.fixture
def apart(net, data) -> BaseModelPool:
    """Two networks of different initialisations, whose running statistics are their own."""
    members = {"a": net(4, seed=1), "b": net(6, seed=2)}
    for name, member in members.items():
        recalibrate_batch_norm(member, data[name], images=200)
    return BaseModelPool(members, train_datasets=data)


def outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    network.eval()
    with torch.no_grad():
        if isinstance(network, MultiTaskNetwork):
            return list(network.outputs(images).values())
        return [network(images)]


def shuffled(model: nn.Module, images: Tensor, seed: int) -> nn.Module:
    spec = permutation_spec(model, images[:1])
    return apply_permutation(model, spec, random_permutation(spec, seed=seed))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("folded", [False, True])
def test_copies_are_zipped_to_the_network(basis, folded, net, train_digits, images) -> None:
    """A copy and two whose units stand in other orders."""
    network = net(10, seed=3)
    recalibrate_batch_norm(network, train_digits, images=200)
    members = {"same": copy.deepcopy(network)}
    members |= {f"order {seed}": shuffled(network, images, seed) for seed in (1, 2)}
    pool = BaseModelPool(members, train_datasets={"_pretrained_": train_digits})
    method = ZipIt(
        basis=basis, folded=folded, batch_norm="merge", calibration_images=300, ridge=1e-6
    )
    (found,) = outputs(method.run(pool), images)
    (expected,) = outputs(network, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("basis", ["zip", "cca"])
def test_copies_of_any_structure_are_zipped_to_the_network(name, basis) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = STRUCTURES[name]().eval()
        pictures = torch.rand(48, 3, 16, 16)
    data = ImageTensors(pictures, torch.arange(48) % 4, class_names=list("wxyz"))
    recalibrate_batch_norm(network, data, images=48, batch_size=48)
    members = {"a": network, "b": shuffled(network, pictures, 1)}
    if basis == "cca":  # fewer images than directions
        members["b"] = copy.deepcopy(network)
    pool = BaseModelPool(members, train_datasets={"_pretrained_": data})
    method = ZipIt(basis=basis, batch_norm="merge", calibration_images=48, batch_size=48)
    (found,) = outputs(method.run(pool), pictures)
    (expected,) = outputs(network, pictures)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_permutation_is_the_average_after_alignment_by_activations(apart, images) -> None:
    options = {"batch_norm": "recalibrate", "calibration_images": 200}
    zipped = ZipIt(basis="permutation", folded=False, **options).run(apart)
    aligned = GitReBasin(by="activations", plot=False, **options).run(apart)
    for one, other in zip(outputs(zipped, images), outputs(aligned, images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_units_of_one_network_are_merged_within_the_budget_only(apart) -> None:
    within = []
    for budget in (0.0, 0.3):
        method = ZipIt(within_budget=budget, calibration_images=200)
        method.run(apart)
        within.append(sum(group["within"] for group in method.report["zip"]["groups"]))
        assert all(group["how"] == "zip" for group in method.report["zip"]["groups"])
    assert within[0] == 0
    assert within[1] > 0


def test_redundant_units_of_one_network_are_merged_without_loss(net, data, images) -> None:
    """Every unit inside a block stands there twice, with half of the weight behind it."""
    network = net(4, seed=1)
    block = network.layer1[0]
    with torch.no_grad():
        for tensor in (block.conv1.weight, *block.bn1.state_dict().values()):
            if tensor.ndim:
                half = len(tensor) // 2
                tensor[half:] = tensor[:half]
    recalibrate_batch_norm(network, data["a"], images=200)
    stranger = net(6, seed=2)
    with torch.no_grad():
        stranger.layer1[0].conv2.weight.zero_()
    recalibrate_batch_norm(stranger, data["b"], images=200)
    pool = BaseModelPool({"a": network, "b": stranger}, train_datasets=data)
    method = ZipIt(within_budget=0.5, calibration_images=200)
    method.run(pool)
    (record,) = [g for g in method.report["zip"]["groups"] if g["group"] == "layer1.0.conv1"]
    assert record["within"] >= record["size"] // 2


@pytest.mark.parametrize("basis", BASES)
def test_tails_are_the_experts_bit_for_bit(basis, apart, images) -> None:
    method = ZipIt(basis=basis, budget=1.7, batch_norm="recalibrate", calibration_images=200)
    result = method.run(apart)
    assert isinstance(result, MultiTaskNetwork)
    first = result.networks[0]
    assert isinstance(first, CutNetwork)
    shared = set(first.cut.trunk)
    assert shared
    own = set(result.own_keys())
    for task in result.tasks:
        expert, found = apart.load_model(task).state_dict(), result.for_task(task).state_dict()
        assert expert.keys() - shared <= own
        for key in expert.keys() - shared:
            assert torch.equal(found[key], expert[key]), key
    for output in outputs(result, images):
        assert output.isfinite().all()


def test_tails_that_are_measured_anew_keep_their_parameters(apart) -> None:
    result = ZipIt(budget=1.7, calibration_images=100).run(apart)
    assert isinstance(result.networks[0], CutNetwork)
    changed = set()
    for task in result.tasks:
        expert, found = apart.load_model(task).state_dict(), result.for_task(task).state_dict()
        own = expert.keys() - set(result.networks[0].cut.trunk)
        changed |= {
            key.rpartition(".")[2] for key in own if not torch.equal(found[key], expert[key])
        }
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(("basis", "budget"), [("zip", 1.3), ("zip", 1.8), ("cca", 1.8)])
def test_the_counted_multiply_adds_keep_the_budget(basis, budget, apart, images) -> None:
    expert = apart.load_model("a")
    body = cost_of(expert, images.shape[1:]).multiply_adds - expert.linear.weight.numel()
    method = ZipIt(basis=basis, budget=budget, batch_norm="merge", calibration_images=50)
    result = method.run(apart)
    heads = sum(network.linear.weight.numel() for network in result.networks)
    counted = (cost_of(result, images.shape[1:]).multiply_adds - heads) / body
    assert 1 < counted <= budget
    assert method.report["zip"]["share_of_one_network"] == pytest.approx(counted)


@pytest.mark.parametrize("basis", BASES)
def test_permuted_copies_have_a_trunk_that_serves_both_tails(basis, net, data, images) -> None:
    """Each tail reads the trunk's features in its own order."""
    network = net(4, seed=1)
    both = dict.fromkeys(("x", "y"), data["a"])
    recalibrate_batch_norm(network, data["a"], images=100)
    pool = BaseModelPool({"x": network, "y": shuffled(network, images, 3)}, train_datasets=both)
    method = ZipIt(basis=basis, budget=1.5, batch_norm="merge", calibration_images=100, ridge=1e-6)
    (expected,) = outputs(network, images)
    for found in outputs(method.run(pool), images):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"budget": 1.6}, {"budget": 1.9, "basis": "cca"}])
def test_a_result_is_saved_loaded_and_exported(options, apart, images, tmp_path) -> None:
    result = ZipIt(calibration_images=100, **options).run(apart)
    apart.save_model(result, tmp_path / "merged.safetensors")
    architecture = apart.load_model("a")
    loaded = Checkpoint(tmp_path / "merged.safetensors", architecture).build()
    expected = outputs(result, images)
    for one, other in zip(outputs(loaded, images), expected, strict=True):
        assert torch.equal(one, other)
    spec = {
        "_target_": "fusion.models.CifarResNet",
        "depth": 8, "num_classes": 4, "in_channels": 1, "width": 0.5,
    }  # fmt: skip
    save_network(tmp_path / "told.safetensors", result, architecture=spec, head=apart.head.tensors)
    told = fusion.load(tmp_path / "told.safetensors")
    for one, other in zip(outputs(told, images), expected, strict=True):
        assert torch.equal(one, other)
    file = export(tmp_path / "told.safetensors", tmp_path / "a.safetensors", task="a")
    (alone,) = outputs(fusion.load(file), images)
    assert torch.equal(alone, expected[0])


def test_mistakes_are_named(apart, net, data) -> None:
    with pytest.raises(UserError, match="budget"):
        ZipIt(budget=0.5)
    with pytest.raises(UserError, match="head=union makes another"):
        ZipIt(budget=1.5, head="union")
    with pytest.raises(UserError, match="training images"):
        ZipIt().run({"a": net(4, seed=1), "b": net(4, seed=2)})
    several = BaseModelPool(
        {"a": net(4, seed=1), "b": net(4, seed=2)},
        train_datasets={"a": data["a"], "b": data["a"]},
        tasks={"a": "t", "b": "t"},
    )
    with pytest.raises(UserError, match="the task 't' has several: a, b"):
        ZipIt(budget=1.5).run(several)
