"""Odd networks: followed as far as is certain, or refused in a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.alignment import (
    PermutationSpec,
    align,
    apply_permutation,
    permutation_spec,
    random_permutation,
)
from fusion.errors import UserError


class Net(nn.Module):
    """Batch norm, a skip connection with a branch given as a function, and a head."""

    def __init__(self, branch: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c2, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)
        self.branch = branch
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.c1(x)))
        return self.fc((x + self.branch(self, x)).mean((2, 3)))


def number() -> nn.Parameter:
    return nn.Parameter(torch.rand(()))


def checked(model: nn.Module, side: int = 8) -> PermutationSpec:
    """Return the symmetries found on images of 8 pixels; check them at another size."""
    model = model.double().eval()
    spec = permutation_spec(model, torch.zeros(1, 1, 8, 8))
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    images = torch.rand(2, 1, side, side, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(permuted(images), model(images), rtol=1e-12, atol=1e-12)
    found = align(permuted, model, spec=spec).model
    for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    return spec


# -- parameters of one number, and of none ---------------------------------------------------------

NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "times": lambda m, x: m.alpha * m.c2(x),
    "expanded": lambda m, x: m.alpha.expand(6).view(1, 6, 1, 1) * m.c2(x),
    "as large as an image": lambda m, x: m.alpha.expand_as(x) * m.c2(x),
    "repeated": lambda m, x: m.c2(x) + m.alpha.repeat(6).view(6, 1, 1),
    "reduced": lambda m, x: m.c2(x) * (m.alpha.sum() + m.alpha.norm() + m.alpha.max()),
    "along its axes": lambda m, x: m.c2(x) * (m.alpha.cumsum(0) + m.alpha.softmax(0)),
    "between": lambda m, x: torch.lerp(x, m.c2(x), m.alpha),
    "two": lambda m, x: m.c2(x) * torch.stack([m.alpha, m.alpha]).softmax(0)[0],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_moves_nothing_and_stops_nothing(name: str) -> None:
    spec = checked(Net(NUMBERS[name], alpha=number()))
    assert [group.size for group in spec.groups] == [6]


def test_layers_without_channels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising no elements does nothing
        empty = nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 6))
    model = Net(lambda m, x: m.c2(x) + m.empty(x.mean((2, 3)))[:, :, None, None], empty=empty)
    spec = checked(model)
    assert any("empty.0" in fixed.reason for fixed in spec.fixed)


def test_what_is_empty_in_the_example_only() -> None:
    def below(m: Net, x: Tensor) -> Tensor:
        rest = m.c2(x)[:, :, 8:] * torch.arange(6.0).view(6, 1, 1).to(x.dtype)
        return x * rest.sum((1, 2, 3)).view(-1, 1, 1, 1)

    checked(Net(below), side=12)


# -- refused ---------------------------------------------------------------------------------------

READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a branch": lambda m, x: m.c2(x) if x.sum() > 0 else x,
    "a number": lambda m, x: m.c2(x) * float(m.fc.bias[0]),
    "a list": lambda m, x: m.c2(x) * m.fc.bias.tolist()[0],
    "numpy": lambda m, x: torch.from_numpy(m.c2(x).numpy()),
    "a mask": lambda m, x: m.c2(x) + x[x > 0].sum(),
    "where it is not zero": lambda m, x: m.c2(x) + len(x.nonzero()),
    "different values": lambda m, x: m.c2(x) + len(x.unique()),
}


@pytest.mark.parametrize("name", READ)
def test_a_forward_pass_that_reads_values_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="depends on the value of a tensor, not only on shapes"):
        permutation_spec(Net(READ[name]).eval(), torch.zeros(1, 1, 8, 8))


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Net(NUMBERS["times"]), {nn.Linear})


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantised": (quantised, "its layer 'fc' is quantised.*before it is quantised"),
    "TorchScript": (
        lambda: torch.jit.trace(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8)),
        "is a TorchScript module",
    ),
    "no result": (lambda: Silent(), "value without a tensor"),
}


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_in_a_sentence(name: str) -> None:
    build, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        permutation_spec(build().eval(), torch.zeros(1, 1, 8, 8))


def test_an_example_without_elements_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(0, 1, 8, 8\), in which there is nothing to follow"):
        permutation_spec(Net(NUMBERS["times"], alpha=number()).eval(), torch.zeros(0, 1, 8, 8))


def test_a_sparse_tensor_is_refused() -> None:
    model = Net(lambda m, x: m.c2(x), mask=nn.Parameter(torch.eye(3).to_sparse())).eval()
    spec = permutation_spec(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="'mask' is a sparse tensor"):
        apply_permutation(model, spec, {})


def test_a_network_without_weights_has_the_symmetries_of_one_with_them() -> None:
    model = Net(NUMBERS["times"], alpha=number()).eval()
    spec = permutation_spec(model, torch.zeros(1, 1, 8, 8))
    assert str(permutation_spec(model.to("meta"), torch.zeros(1, 1, 8, 8))) == str(spec)
