"""Alignment: what comes back is the same function in the reference's order, and never worse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.alignment import (
    PermutationSpec,
    align,
    align_all,
    apply_permutation,
    cycle_consistency,
    inverse,
    permutation_spec,
    random_permutation,
)
from fusion.errors import UserError
from fusion.models import CifarResNet, SeparableResNet


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Return 512 real images (N, 1, 8, 8) with values around 0."""
    return torch.tensor(load_digits().images[:512], dtype=torch.float32)[:, None] / 8 - 1


def trained(seed: int, images: Tensor, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    model = CifarResNet(depth=8, num_classes=classes, in_channels=1, shortcut="A")
    labels = torch.tensor(load_digits().target[:512]) % classes
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(24):
        part = slice(step % 8 * 64, step % 8 * 64 + 64)
        optimiser.zero_grad()
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def pair(images: Tensor) -> tuple[nn.Module, nn.Module, PermutationSpec]:
    """Return two networks trained from different starts, and their symmetries."""
    a, b = trained(0, images), trained(1, images)
    return a, b, permutation_spec(a, images[:2])


Pair = tuple[nn.Module, nn.Module, PermutationSpec]
BY = pytest.mark.parametrize("by", ["weights", "activations"])


@BY
def test_the_aligned_model_computes_the_same(pair: Pair, images: Tensor, by: str) -> None:
    a, b = (copy.deepcopy(m).double() for m in pair[:2])
    found = align(a, b, spec=pair[2], by=by, data=[images])
    assert found.changed
    assert found.objective_after > found.objective_before
    with torch.no_grad():
        expected, got = a(images.double()), found.model(images.double())
    assert float((expected - got).norm() / expected.norm()) < 1e-12


@BY
def test_gains_add_up(pair: Pair, images: Tensor, by: str) -> None:
    found = align(pair[0], pair[1], spec=pair[2], by=by, data=[images])
    gain = found.objective_after - found.objective_before
    table = found.table()
    assert table["gain"].sum() == pytest.approx(gain, abs=1e-9)
    assert list(table["group"]) == [group.name for group in pair[2].groups]
    assert bool((table["moved"] <= table["size"]).all())


@BY
def test_a_trained_network_comes_back_bit_for_bit(pair: Pair, images: Tensor, by: str) -> None:
    reference, _, spec = pair
    other = apply_permutation(reference, spec, random_permutation(spec, 2))
    found = align(other, reference, spec=spec, by=by, data=[images])
    assert_same(found.model, reference)
    assert found.objective_after == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_a_noisy_copy_is_put_in_order(pair: Pair, noise: float) -> None:
    reference, _, spec = pair
    planted = random_permutation(spec, 2)
    other = apply_permutation(reference, spec, planted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p += noise * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator)
    found = align(other, reference, spec=spec)
    back = inverse(spec, planted)
    assert all(torch.equal(found.permutations[name], p) for name, p in back.items())


@BY
def test_the_reference_itself_stays(pair: Pair, images: Tensor, by: str) -> None:
    found = align(pair[0], pair[0], spec=pair[2], by=by, data=[images])
    assert not found.changed
    assert found.objective_after == found.objective_before
    assert_same(found.model, pair[0])


@BY
def test_forth_and_back_is_nothing(pair: Pair, images: Tensor, by: str) -> None:
    reference, _, spec = pair
    other = apply_permutation(reference, spec, random_permutation(spec, 5))
    assert cycle_consistency(other, reference, spec=spec, by=by, data=[images]) == 0


def test_inputs_stay_and_the_result_repeats(pair: Pair, images: Tensor) -> None:
    a, b, spec = pair
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    first, again = (align(a, b, spec=spec, seed=3) for _ in range(2))
    assert_same(first.model, again.model)
    align(a, b, spec=spec, by="activations", data=[(images, None)])
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type(pair: Pair, dtype: torch.dtype) -> None:
    reference, _, spec = pair
    reference = copy.deepcopy(reference).to(dtype)
    other = apply_permutation(reference, spec, random_permutation(spec, 2))
    found = align(other, reference, spec=spec)
    assert next(found.model.parameters()).dtype == dtype
    assert_same(found.model, reference)


def test_experts_with_heads_of_their_own(images: Tensor, pair: Pair) -> None:
    base, _, spec = pair
    experts, expected = {}, {}
    for name, classes in (("four", 4), ("six", 6)):
        expert = copy.deepcopy(base)
        expert.linear = nn.Linear(64, classes).eval()
        expected[name] = expert
        experts[name] = apply_permutation(expert, spec, random_permutation(spec, classes))
    found = align_all(experts, base, example_input=images[:2])
    for name, alignment in found.items():
        assert_same(alignment.model, expected[name])


def test_default_initialisation_of_the_separable_net(images: Tensor) -> None:
    torch.manual_seed(0)
    reference = SeparableResNet(width=0.25, in_channels=1).eval()
    spec = permutation_spec(reference, images[:2])
    other = apply_permutation(reference, spec, random_permutation(spec, 2))
    assert_same(align(other, reference, spec=spec).model, reference)


def change(model: nn.Module, edit: Callable[[nn.Module], object]) -> nn.Module:
    model = copy.deepcopy(model)
    edit(model)
    return model


def test_mistakes_are_named_before_the_work(pair: Pair, images: Tensor) -> None:
    a, b, spec = pair
    with pytest.raises(UserError, match="either spec or example_input"):
        align(a, b)
    with pytest.raises(UserError, match="'weights' or 'activations', got 'weight'"):
        align(a, b, spec=spec, by="weight")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs data"):
        align(a, b, spec=spec, by="activations")
    with pytest.raises(UserError, match="no images came"):
        align(a, b, spec=spec, by="activations", data=[])
    with pytest.raises(UserError, match="reference must be in eval mode"):
        align(a, change(b, nn.Module.train), spec=spec)

    def spoil(model: nn.Module) -> None:
        next(model.parameters()).data.view(-1)[3] = float("nan")

    with pytest.raises(UserError, match="the model has weights that are not finite in 'conv1"):
        align(change(a, spoil), b, spec=spec)
    deeper = CifarResNet(depth=14, in_channels=1).eval()
    with pytest.raises(
        UserError, match=r"differ in architecture: only the reference has 'layer1\.1"
    ):
        align(a, deeper, example_input=images[:2])
    wider = CifarResNet(depth=8, in_channels=1, width=2).eval()
    with pytest.raises(UserError, match="they must agree"):
        align(a, wider, spec=spec)
    with pytest.raises(UserError, match="'second': the model must be in eval mode"):
        align_all({"first": b, "second": change(b, nn.Module.train)}, a, spec=spec)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
