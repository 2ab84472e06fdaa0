"""The laws of symmetry and matching for one small member of each torchvision family."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fusion.alignment import (
    PermutationSpec,
    align,
    apply_permutation,
    inverse,
    permutation_spec,
    random_permutation,
)

Member = tuple[nn.Module, Tensor, PermutationSpec]
ROUNDING = 1e-12  # in float64, of the output
ERROR = 1e-6  # what a symmetry that misses one entry changes the output by, at least
ENTRIES = 8  # left out one at a time, drawn from all of them; `slow` leaves out every one
MANY = 15_000_000  # parameters from which on a test takes seconds


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def is_large(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > MANY


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


def without_one(model: nn.Module, spec: PermutationSpec, group_at: int, entry_at: int) -> nn.Module:
    """Rotate one group in all of its entries but one."""
    group = spec.groups[group_at]
    entries = group.entries[:entry_at] + group.entries[entry_at + 1 :]
    partial = PermutationSpec((replace(group, entries=entries, members=()),), spec.shapes)
    return apply_permutation(model, partial, {group.name: torch.arange(group.size).roll(1)})


def test_a_random_permutation_keeps_the_function(member: Member) -> None:
    model, x, spec = member
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    assert distance(output(model, x), output(permuted, x)) < ROUNDING
    assert any(
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), permuted.parameters(), strict=True)
    )


def test_nearly_every_parameter_is_covered(member: Member) -> None:
    model, _, spec = member
    total = sum(p.numel() for p in model.parameters())
    # All but a thousandth; in the narrowest networks the ten biases of the head are more than that.
    assert (1 - spec.coverage) * total <= max(0.001 * total, 10.5)
    assert {f.reason for f in spec.fixed} <= {"input", "output", "no other unit being like it"}


def left_out(spec: PermutationSpec) -> list[tuple[int, int]]:
    return [(g, e) for g, group in enumerate(spec.groups) for e in range(len(group.entries))]


def test_no_entry_can_be_left_out(member: Member) -> None:
    model, x, spec = member
    expected = output(model, x)
    entries = 2 if is_large(model) else ENTRIES
    for g, e in random.Random(0).sample(left_out(spec), entries):
        change = distance(expected, output(without_one(model, spec, g, e), x))
        assert change > ERROR, f"{spec.groups[g].name}: {spec.groups[g].entries[e]}"


@pytest.mark.slow
def test_not_one_entry_can_be_left_out(member: Member) -> None:
    model, x, spec = member
    expected = output(model, x)
    for g, e in left_out(spec):
        change = distance(expected, output(without_one(model, spec, g, e), x))
        assert change > ERROR, f"{spec.groups[g].name}: {spec.groups[g].entries[e]}"


@pytest.mark.parametrize("noise", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_planted_permutation_is_recovered(member: Member, noise: float) -> None:
    if is_large(member[0]):
        pytest.skip("takes seconds: under the marker slow")
    check_recovery(member[0], member[2], noise)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.5])
def test_a_planted_permutation_is_recovered_at_any_noise(member: Member, noise: float) -> None:
    check_recovery(member[0], member[2], noise)


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_planted_permutation_is_recovered_by_activations(member: Member, large: bool) -> None:
    model, x, spec = member
    if is_large(model) != large:
        pytest.skip("the large members are under the marker slow, the others are not")
    images = torch.randn(32, *x.shape[1:], generator=torch.Generator().manual_seed(5))
    check_recovery(model, spec, by="activations", data=[images])


def check_recovery(
    model: nn.Module, spec: PermutationSpec, noise: float = 0.0, **options: Any
) -> None:
    reference = copy.deepcopy(model).float()
    planted = random_permutation(spec, 3)
    other = apply_permutation(reference, spec, planted)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in other.parameters():
            p += noise * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator)
    found = align(other, reference, spec=spec, **options)
    assert found.objective_after >= found.objective_before
    back = inverse(spec, planted)
    assert all(torch.equal(found.permutations[name], p) for name, p in back.items())
    if noise == 0:
        pairs = zip(reference.state_dict().values(), found.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# -- every constructor -----------------------------------------------------------------------------

CNNS = (
    "alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "mnasnet",
    "mobilenet", "regnet", "resnet", "resnext", "shufflenet", "squeezenet", "vgg", "wide_resnet",
)  # fmt: skip
CONSTRUCTORS = [
    name
    for name in models.list_models(module=models)
    if name.startswith(CNNS) and not name.startswith("quantized")
]


def build(name: str) -> nn.Module:
    if name.startswith(("googlenet", "inception")):
        return models.get_model(name, weights=None, init_weights=False)
    if name.startswith("vgg"):
        return models.get_model(name, weights=None, init_weights=False)
    return models.get_model(name, weights=None)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor(name: str, request: pytest.FixtureRequest) -> None:
    randomise = request.getfixturevalue("randomiser")
    torch.manual_seed(0)
    side = 299 if name.startswith("inception") else 64
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    model = randomise(build(name).double(), x)
    spec = permutation_spec(model, x)
    assert spec.coverage >= 0.999, str(spec.fixed)
    expected = output(model, x)
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    assert distance(expected, output(permuted, x)) < ROUNDING
    del permuted
    for g, e in random.Random(0).sample(left_out(spec), 3):
        change = distance(expected, output(without_one(model, spec, g, e), x))
        assert change > ERROR, f"{spec.groups[g].name}: {spec.groups[g].entries[e]}"
