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
    agreement,
    align,
    align_all,
    apply_permutation,
    cycle_consistency,
    inverse,
    permutation_spec,
    random_permutation,
)
from fusion.alignment.agreement import by_weights
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


# Of 500 drawn, those in which the forward sweep gives every unit the partner it likes best, and yet
# ends below the identity.
@pytest.mark.parametrize(("noise", "seed"), [(1.0, 121), (1.0, 165), (2.0, 50)])
def test_the_objective_never_falls(noise: float, seed: int) -> None:
    torch.manual_seed(seed)
    reference = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)).double().eval()
    spec = permutation_spec(reference, torch.zeros(1, 2))
    other = copy.deepcopy(reference)
    with torch.no_grad():
        for p in other.parameters():
            p += noise * p.std() * torch.randn_like(p)
    found = align(other, reference, spec=spec)
    identity = by_weights(
        spec, other, reference, seed=0, max_sweeps=100, device=torch.device("cpu")
    ).descend_from_identity()
    assert found.objective_after >= found.objective_before
    assert found.objective_after >= identity.objective - 1e-9


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
@BY
def test_members_of_different_precision(
    pair: Pair, images: Tensor, by: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    reference, _, spec = pair
    planted = random_permutation(spec, 2)
    other = apply_permutation(reference, spec, planted).to(dtypes[0])
    wide = copy.deepcopy(reference).to(dtypes[1])
    found = align(other, wide, spec=spec, by=by, data=[images])
    assert {p.dtype for p in found.model.parameters()} == {dtypes[0]}
    back = inverse(spec, planted)
    assert all(torch.equal(found.permutations[name], p) for name, p in back.items())


def test_tiny_weights_and_zeros_count_like_others(pair: Pair) -> None:
    reference, _, spec = change(pair[0], lambda m: None), *pair[1:]
    with torch.no_grad():
        reference.bn1.weight.mul_(1e-30)
        reference.bn1.bias.zero_()
    planted = random_permutation(spec, 2)
    found = align(apply_permutation(reference, spec, planted), reference, spec=spec)
    assert found.objective_after == pytest.approx(1, abs=1e-6)
    assert_same(found.model, reference)


@BY
def test_a_grouped_transposed_convolution_is_put_in_order(by: str) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 100, 5),
    ).eval()  # fmt: skip
    images = torch.randn(16, 3, 8, 8)
    spec = permutation_spec(reference, images[:1])
    planted = random_permutation(spec, 2)
    assert any(group.members for group in spec.groups)
    found = align(
        apply_permutation(reference, spec, planted), reference, spec=spec, by=by, data=images
    )
    assert_same(found.model, reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BY
def test_on_a_gpu(pair: Pair, images: Tensor, by: str) -> None:
    reference, _, spec = pair
    planted = apply_permutation(reference, spec, random_permutation(spec, 2))
    for device, home in (("cuda", "cpu"), (None, "cuda")):
        found = align(
            copy.deepcopy(planted).to(home), reference, spec=spec, by=by, data=[images],
            device=device,
        )  # fmt: skip
        assert {p.device.type for p in found.model.parameters()} == {home}
        assert_same(found.model.cpu(), reference)


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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the images of each forward pass of alignment, by the first weight of the network."""
    images: dict[str, int] = {}
    run = agreement.run_on

    def counted(model: nn.Module, x: Tensor) -> None:
        key = fingerprint(model)
        images[key] = images.get(key, 0) + len(x)
        run(model, x)

    monkeypatch.setattr(agreement, "run_on", counted)
    return images


def fingerprint(model: nn.Module) -> str:
    return str(next(model.parameters()).double().sum().item())


def test_each_network_sees_the_images_once(
    pair: Pair, images: Tensor, seen: dict[str, int]
) -> None:
    reference, other, spec = pair
    third = trained(2, images)
    models = {"other": other, "itself": reference, "third": third}
    found = align_all(
        models, reference, spec=spec, by="activations", data=[images], cycle=True, seed=4
    )
    networks = (reference, other, third)
    assert seen == {fingerprint(network): len(images) for network in networks}
    assert not found["itself"].changed
    assert found["itself"].cycle_consistency == 0
    # Sharing passes changes no bit.
    for name in ("other", "third"):
        alone = align(models[name], reference, spec=spec, by="activations", data=[images], seed=4)
        assert_same(found[name].model, alone.model)
        assert found[name].objective_before == alone.objective_before
        assert found[name].objective_after == alone.objective_after


@BY
def test_the_way_back_is_that_of_an_alignment_of_its_own(
    pair: Pair, images: Tensor, seen: dict[str, int], by: str
) -> None:
    """The transposed comparison finds what comparing the other way round finds."""
    reference, other, spec = pair
    options = {"spec": spec, "by": by, "data": [images], "seed": 1}
    cycle = cycle_consistency(other, reference, **options)
    assert sum(seen.values()) == (2 * len(images) if by == "activations" else 0)
    forth = align(other, reference, **options)
    back = align(reference, other, **options)
    assert forth.changed  # the same way twice would be another network
    returned = apply_permutation(forth.model, spec, back.permutations)
    pairs = zip(other.parameters(), returned.parameters(), strict=True)
    squares = sum(float((a - b).detach().double().square().sum()) for a, b in pairs)
    count = sum(p.numel() for p in other.parameters())
    assert cycle == pytest.approx(squares / count, rel=1e-9)


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
    with pytest.raises(UserError, match=r"\(2, 3, 8, 8\) do not fit CifarResNet"):
        align(a, b, spec=spec, by="activations", data=torch.zeros(2, 3, 8, 8))
    bare = Bare().eval()
    with pytest.raises(UserError, match="none of them makes the units of a group"):
        align(bare, bare, example_input=images[:2], by="activations", data=images)
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


class Bare(nn.Module):
    """Its convolutions are functions of parameters, which no hook can watch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 1, 3, 3)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.conv2d(x, self.a).relu().mean((2, 3)), self.b)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
