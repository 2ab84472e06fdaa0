"""Odd networks: each is merged right or refused in a sentence, whatever is done with it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fusion
from fusion.errors import UserError
from fusion.method import DummyAlgorithm
from fusion.method.presets import algorithm

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Batch norm, a skip connection and a head."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(1, 4, 3, padding=1), norm(4)
        self.c2, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.n1(self.c1(x)))
        return self.fc((x + self.branch(x)).mean((2, 3)))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.c2(x)


class ReZero(Net):
    """A scale that is a single number, as in ReZero, or a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(()))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.alpha * self.c2(x)


class Extra(Net):
    """Keeps something in the state dict that is no tensor."""

    def get_extra_state(self) -> object:
        return {"classes": ["a", "b"]}

    def set_extra_state(self, state: object) -> None:
        del state


def changed(make: Callable[[], Net], change: Callable[[Net], object]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        net = make()
        change(net)
        return net

    return made


def quantised(net: Net) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})


def with_old_weight_norm(net: Net) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.c1)


def with_complex(net: Net) -> None:
    net.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def with_sparse(net: Net) -> None:
    net.s = nn.Parameter(torch.eye(3).to_sparse())


def with_lock(net: Net) -> None:
    net.lock = threading.Lock()


def with_lazy(net: Net) -> None:
    net.c1 = nn.LazyConv2d(4, 3)


MERGED = {
    "plain": Net,
    "a number as a parameter": ReZero,
    "extra state": Extra,
    "quantised": lambda: quantised(Net()),
    "instance norm with statistics": lambda: Net(
        lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)
    ),
    "batch norm without statistics": lambda: Net(
        lambda n: nn.BatchNorm2d(n, track_running_stats=False)
    ),
    "half precision": lambda: Net().bfloat16(),
    "compiled": lambda: torch.compile(Net()),
    "data parallel": lambda: nn.DataParallel(Net()),
}
REFUSED = {
    "TorchScript": (lambda: torch.jit.script(Net()), "is a TorchScript module"),
    "weight norm": (changed(Net, with_old_weight_norm), "remove_weight_norm"),
    "pruned": (changed(Net, lambda n: prune.l1_unstructured(n.c1, "weight", 0.5)), "prune.remove"),
    "lazy": (changed(Net, with_lazy), "'c1.weight' has no shape yet"),
    "meta": (lambda: Net().to("meta"), "lies on the meta device"),
    "sparse": (changed(Net, with_sparse), "make it dense"),
    "float8": (
        changed(Net, lambda n: n.register_buffer("f", torch.ones(2).to(torch.float8_e4m3fn))),
        "in which nothing can be computed",
    ),
    "a lock": (changed(Net, with_lock), "holds something that cannot be copied"),
}
NOT_MERGED = {
    "parametrized weight norm": changed(Net, lambda n: parametrizations.weight_norm(n.c1)),
    "spectral norm": changed(Net, lambda n: parametrizations.spectral_norm(n.c1)),
    "orthogonal": changed(Net, lambda n: parametrizations.orthogonal(n.c2)),
    "complex": changed(Net, with_complex),
}
METHODS = ("simple_average", "ties_merging", "iso_c", "snr_selective_merge")


def members(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    made = {}
    for seed, name in enumerate(("_pretrained_", "a", "b")):
        torch.manual_seed(seed)
        made[name] = make()
    return made


def merge(models: dict[str, nn.Module], method: str) -> nn.Module:
    made = algorithm(method)
    made.plot = False
    if method == "snr_selective_merge":
        made.alignment = None
    return made.run(models)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MERGED)
def test_an_odd_network_is_merged(kind: str, method: str, attack) -> None:
    models = members(MERGED[kind])
    with attack("networks", "right"):
        model = merge(models, method).eval()
        dtype = next(iter(model.parameters())).dtype
        assert torch.isfinite(model(IMAGES.to(dtype))).all()
        for name, buffer in model.named_buffers():
            assert not name.endswith("running_var") or bool((buffer > 0).all())


def test_a_number_is_averaged_like_any_parameter() -> None:
    models = members(ReZero)
    merged = fusion.merge(models, "simple_average")
    assert merged.alpha.shape == ()
    torch.testing.assert_close(merged.alpha, (models["a"].alpha + models["b"].alpha) / 2)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_member_is_refused_in_a_sentence(kind: str, attack) -> None:
    make, said = REFUSED[kind]
    models = members(make)
    for method in ("simple_average", "dummy"):
        made = DummyAlgorithm() if method == "dummy" else algorithm(method)
        with attack("networks", "sentence"), pytest.raises(UserError, match=said):
            made.run(models)


@pytest.mark.parametrize("kind", NOT_MERGED)
def test_parameters_that_are_no_weights_are_not_averaged(kind: str, attack) -> None:
    models = members(NOT_MERGED[kind])
    refused = pytest.raises(UserError, match=r"is parametrized|is complex")
    with attack("networks", "sentence"), refused:
        fusion.merge(models, "simple_average")
    assert isinstance(DummyAlgorithm().run(models), Net)  # to be measured it may be what it is
