"""Small real networks: residual, with batch norm, whose heads differ in size."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.cli.freed_memory import keep_freed_memory
from fusion.data import ImageTensors, digits, seed_from
from fusion.models import CifarResNet

keep_freed_memory()  # as every run does

EXPERT_CLASSES = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9)}


def make_net(num_classes: int = 10, seed: int = 0) -> CifarResNet:
    """A ResNet-8 of 8 to 32 channels whose batch norms have seen something.

    Its convolutions are noise and two strong directions, as those of a trained network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = CifarResNet(8, num_classes, in_channels=1, width=0.5)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                rows, columns = module.weight.flatten(1).shape
                signal = torch.randn(rows, 2) @ torch.randn(2, columns)
                module.weight.data += 0.1 * (1 + torch.rand(())) * signal.view_as(module.weight)
            if isinstance(module, _BatchNorm):
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(seed + 7)
    return net.eval()


def make_expert(base: nn.Module, classes: Sequence[int], seed: int) -> CifarResNet:
    """The base moved a little everywhere, with its head's rows for some classes."""
    expert = CifarResNet(8, len(classes), in_channels=1, width=0.5).eval()
    state = {}
    for key, tensor in base.state_dict().items():
        if key.startswith(HEAD):
            tensor = tensor[list(classes)]
        if tensor.is_floating_point():
            generator = torch.Generator().manual_seed(seed_from(seed, key) % 2**31)
            tensor = tensor * (1 + 0.2 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor = tensor + seed
        state[key] = tensor.abs() if key.endswith("running_var") else tensor
    expert.load_state_dict(state)
    return expert


HEAD = next(reversed(make_net().state_dict())).rpartition(".")[0]


@pytest.fixture(scope="session")
def train_digits() -> ImageTensors:
    return digits("train")


@pytest.fixture(scope="session")
def test_digits() -> ImageTensors:
    return digits("test")


@pytest.fixture
def net() -> Callable[..., CifarResNet]:
    """The maker of a network from the number of its classes and a seed."""
    return make_net


@pytest.fixture
def base() -> CifarResNet:
    return make_net()


@pytest.fixture
def experts(base: CifarResNet) -> dict[str, nn.Module]:
    """Two experts of the base on four and on six classes."""
    return {
        name: make_expert(base, classes, seed)
        for seed, (name, classes) in enumerate(EXPERT_CLASSES.items(), start=1)
    }


@pytest.fixture
def peers(base: CifarResNet) -> dict[str, nn.Module]:
    """Three experts of the base with heads of its own shape."""
    return {f"p{seed}": make_expert(base, range(10), seed) for seed in (1, 2, 3)}


@pytest.fixture
def pool(base: CifarResNet, experts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The base and two experts as plain Python holds them."""
    return {"_pretrained_": base, **experts}


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.fixture
def equal() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two networks hold the same tensors bit for bit."""
    return same_bits


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the members that were trained on one batch are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def main_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> Iterator[Callable[..., None]]:
    """The command's function in this process, which has paid for torch, in an empty folder.

    What it sets is set back.
    """
    from hydra.core.global_hydra import GlobalHydra

    from fusion.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_CACHE", str(cache))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["fusion_bench"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str) -> None:
        GlobalHydra.instance().clear()
        main(arguments)

    yield run
    GlobalHydra.instance().clear()
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
