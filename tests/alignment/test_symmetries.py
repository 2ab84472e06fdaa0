"""Symmetries found from a network's graph: structures beyond torchvision's, and what is refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.alignment import (
    align,
    apply_permutation,
    compose,
    inverse,
    permutation_spec,
    random_permutation,
    spec_from_table,
)
from fusion.alignment.example import example_input_for
from fusion.errors import UserError
from fusion.models import CifarResNet, SeparableResNet


class Net(nn.Module):
    """Named parts and a forward pass given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(n_in: int, n_out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


def crelu(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(m.b(torch.cat([x.relu(), (-x).relu()], dim=1)).mean((2, 3)))


def self_coupled(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head((x + m.b(x).tanh()).flatten(1))


def shared(m: Net, x: Tensor) -> Tensor:
    return m.head(m.b(m.b(m.a(x)).relu()).flatten(1))


def spatial_attention(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
    return m.head((x * torch.sigmoid(m.b(gate))).flatten(1))


def plain(m: Net, x: Tensor) -> Tensor:
    return m.head(m.norm(m.b(m.a(x).relu())).relu().flatten(1))


def squeeze_and_excite(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    n, c = x.shape[:2]
    gate = m.up(m.down(x.mean((2, 3))).relu()).sigmoid().view(n, c, 1, 1)
    return m.head((x * gate.expand_as(x)).flatten(1))


def tied(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head((m.b(x).relu() + m.c(x)).flatten(1))


def tied_net() -> nn.Module:
    net = Net(tied, a=conv(3, 5), b=conv(5, 6), c=conv(5, 6), head=nn.Linear(384, 4))
    net.c.weight = net.b.weight
    return net


def position_bias(m: Net, x: Tensor) -> Tensor:
    return m.head((m.a(x) + m.bias).relu().flatten(1))


NETS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "crelu": (lambda: Net(crelu, a=conv(3, 5), b=conv(10, 6), head=nn.Linear(6, 4)), {"a", "b"}),
    "self-coupled": (
        lambda: Net(self_coupled, a=conv(3, 6), b=conv(6, 6), head=nn.Linear(6 * 64, 4)), {"a"},
    ),
    "shared": (
        lambda: Net(shared, a=conv(3, 6), b=conv(6, 6), head=nn.Linear(6 * 64, 4)), {"a"},
    ),
    "spatial attention": (
        lambda: Net(spatial_attention, a=conv(3, 6), b=conv(2, 1), head=nn.Linear(384, 4)), {"a"},
    ),
    "group norm": (
        lambda: Net(plain, a=conv(3, 6), b=conv(6, 8), norm=nn.GroupNorm(2, 8),
                    head=nn.Linear(512, 4)), {"a", "b/0", "b/1", "b blocks"},
    ),
    "layer norm": (
        lambda: Net(plain, a=conv(3, 6), b=conv(6, 8), norm=nn.LayerNorm((8, 8, 8)),
                    head=nn.Linear(512, 4)), {"a", "b"},
    ),
    "grouped": (
        lambda: Net(plain, a=conv(3, 6), b=conv(6, 8, groups=2), norm=nn.PReLU(8),
                    head=nn.Linear(512, 4)), {"a/0", "a/1", "b/0", "b/1", "a blocks"},
    ),
    "depthwise, two filters each": (
        lambda: Net(plain, a=conv(3, 4), b=conv(4, 8, groups=4), norm=nn.BatchNorm2d(8),
                    head=nn.Linear(512, 4)), {"a blocks", *(f"b/{i}" for i in range(4))},
    ),
    "transposed": (
        lambda: Net(plain, a=conv(3, 6), b=nn.ConvTranspose2d(6, 8, 3, padding=1, groups=2),
                    norm=nn.InstanceNorm2d(8, affine=True), head=nn.Linear(512, 4)),
        {"a/0", "a/1", "b/0", "b/1", "a blocks"},
    ),
    "squeeze and excite": (
        lambda: Net(squeeze_and_excite, a=conv(3, 6), down=nn.Linear(6, 3), up=nn.Linear(3, 6),
                    head=nn.Linear(384, 4)), {"a", "down"},
    ),
    "tied": (tied_net, {"a", "b"}),
    "position bias": (
        lambda: Net(position_bias, a=conv(3, 6), bias=nn.Parameter(torch.randn(6, 8, 8)),
                    head=nn.Linear(384, 4)), {"a"},
    ),
}  # fmt: skip
OURS: dict[str, Callable[[], nn.Module]] = {
    "separable": lambda: SeparableResNet(width=0.125),
    "cifar, shortcut A": lambda: CifarResNet(depth=8, shortcut="A"),
    "cifar, shortcut B": lambda: CifarResNet(depth=8, shortcut="B"),
}


@pytest.mark.parametrize("name", NETS)
def test_groups_of_a_structure(name: str) -> None:
    build, expected = NETS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    spec = permutation_spec(model, x)
    assert set(spec.by_name) == expected, str(spec)
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    assert relative(model(x), permuted(x)) < 1e-12


@pytest.mark.parametrize("name", OURS)
def test_our_networks(name: str, randomiser: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model = randomiser(OURS[name]().double(), x)
    spec = permutation_spec(model, x)
    total = sum(p.numel() for p in model.parameters())
    # Left are the ten biases of the head, and the depthwise stem on the input's three channels.
    left = 10 + (3 * (9 + 1 + 2) if name == "separable" else 0)
    assert (1 - spec.coverage) * total == pytest.approx(left)
    first, second = random_permutation(spec, 1), random_permutation(spec, 2)
    permuted = apply_permutation(model, spec, first)
    assert relative(model(x), permuted(x)) < 1e-12
    both = apply_permutation(permuted, spec, second)
    at_once = apply_permutation(model, spec, compose(spec, first, second))
    assert_same(both, at_once)
    assert_same(model, apply_permutation(permuted, spec, inverse(spec, first)))


def test_blocks_and_units_compose_and_invert() -> None:
    model = NETS["grouped"][0]().eval()
    spec = permutation_spec(model, torch.zeros(1, 3, 8, 8))
    for seed in range(8):
        first, second = random_permutation(spec, seed), random_permutation(spec, seed + 100)
        step = apply_permutation(model, spec, first)
        at_once = apply_permutation(model, spec, compose(spec, first, second))
        assert_same(apply_permutation(step, spec, second), at_once)
        assert_same(model, apply_permutation(step, spec, inverse(spec, first)))


def test_a_draw_depends_on_the_seed_and_the_name_only() -> None:
    model = NETS["crelu"][0]().eval()
    spec = permutation_spec(model, torch.zeros(1, 3, 8, 8))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again = random_permutation(spec, 4), random_permutation(spec, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(p, one[name]) for name, p in random_permutation(spec, 5).items())


def test_what_is_not_proven_stays_fixed_and_is_named() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(torch.cumsum(m.b(m.a(x)), dim=1).flatten(1))

    model = Net(forward, a=conv(3, 6), b=conv(6, 8), head=nn.Linear(512, 4)).eval()
    spec = permutation_spec(model, torch.zeros(1, 3, 8, 8))
    assert set(spec.by_name) == {"a"}
    reasons = {(f.tensor, f.axis): f.reason for f in spec.fixed}
    assert reasons["b.weight", 0] == "cumsum"
    assert reasons["a.weight", 1] == "input"
    assert reasons["head.bias", 0] == "output"
    assert "cumsum" in str(spec)
    assert "a: 6 units" in str(spec)


def test_a_hook_is_part_of_the_forward_pass() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = Net(lambda m, x: m.head(m.b(m.a(x)).mean((2, 3))), a=conv(3, 6), b=conv(6, 8),
                head=nn.Linear(8, 4)).double().eval()  # fmt: skip
    ramp = torch.arange(1.0, 9.0, dtype=torch.float64).view(-1, 1, 1)
    model.b.register_forward_hook(lambda module, args, output: output * ramp.to(output.device))
    spec = permutation_spec(model, x)
    reasons = {(f.tensor, f.axis): f.reason for f in spec.fixed}
    assert reasons["b.weight", 0] == "a constant"
    assert set(spec.by_name) == {"a"}
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    with torch.no_grad():
        torch.testing.assert_close(permuted(x), model(x), rtol=1e-12, atol=1e-12)


def test_one_weight_in_convolutions_of_different_groups() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.conv2d(m.a(x), m.w, padding=1).relu()
        return m.head(F.conv2d(input=x, weight=m.w, padding=1, groups=2).mean((2, 3)))

    weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    model = Net(forward, a=conv(3, 4), w=weight, head=nn.Linear(8, 5)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    spec = permutation_spec(model, x)
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    with torch.no_grad():
        torch.testing.assert_close(permuted(x), model(x), rtol=1e-12, atol=1e-12)


def test_tensors_that_are_no_parameters_do_not_stand_in_the_way() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = (x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / m.scales[0]
        x = x[:, m.order] * torch.arange(x.shape[-1])
        return m.head(m.a(x)[:, m.mask].mean((2, 3)))

    model = Net(forward, a=conv(3, 6), head=nn.Linear(4, 4)).eval()
    model.scales = [torch.full((1, 3, 1, 1), 0.25)]
    model.order, model.mask = torch.tensor([2, 1, 0]), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    spec = permutation_spec(model, torch.zeros(1, 3, 8, 8))
    assert {f.reason for f in spec.fixed if f.tensor == "a.weight"} == {"input"}
    # What the mask keeps, and what it does not.
    assert [group.entries[0].positions.flatten().tolist() for group in spec.groups] == [
        [0, 1, 3, 5], [2, 4],
    ]  # fmt: skip
    assert model.scales[0].device == torch.device("cpu")
    assert torch.equal(example_input_for(model), torch.zeros(1, 3, 224, 224))


def test_a_spec_holds_at_other_sizes_and_batches() -> None:
    model = OURS["cifar, shortcut A"]().double().eval()
    spec = permutation_spec(model, torch.zeros(1, 3, 16, 16))
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    for shape in ((3, 3, 16, 16), (1, 3, 24, 20)):
        x = torch.randn(shape, dtype=torch.float64)
        assert relative(model(x), permuted(x)) < 1e-12


def test_the_default_device_does_not_matter() -> None:
    model = OURS["cifar, shortcut B"]().eval()
    x = torch.zeros(1, 3, 16, 16)
    expected = str(permutation_spec(model, x))
    with torch.device("meta"):
        spec = permutation_spec(model, x)
        drawn = random_permutation(spec, 1)
        moved = apply_permutation(model, spec, drawn)
        found = align(moved, model, spec=spec)
    assert str(spec) == expected
    assert all(torch.equal(found.permutations[k], p) for k, p in inverse(spec, drawn).items())


def test_a_state_that_is_no_tensor_and_a_mapping_that_is_no_dict() -> None:
    class Counting(nn.ReLU):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(m.act(m.a(x)).mean((2, 3)))

    model = Net(forward, a=conv(3, 6), act=Counting(), head=nn.Linear(6, 4)).eval()
    x = torch.zeros(1, 3, 8, 8)
    spec = permutation_spec(model, x)
    drawn = random_permutation(spec, 1)
    aligned = align(apply_permutation(model, spec, drawn), model, spec=spec).model
    assert torch.equal(aligned.a.weight, model.a.weight)
    view = MappingProxyType(dict(model.named_parameters()))
    permuted = apply_permutation(view, spec, drawn)
    assert torch.equal(permuted["a.weight"], model.a.weight[drawn["a"]])


def test_inputs_are_untouched_and_metadata_stays() -> None:
    model = OURS["separable"]().eval()
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    spec = permutation_spec(model, torch.zeros(1, 3, 16, 16))
    permuted = apply_permutation(state, spec, random_permutation(spec, 1))
    assert permuted._metadata == state._metadata  # type: ignore[attr-defined]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_spec_by_hand_equals_the_derived_one() -> None:
    model = Net(self_coupled, a=conv(3, 6), b=conv(6, 6), head=nn.Linear(6, 4)).eval()
    axes = [("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0), ("b.weight", 1)]
    by_hand = spec_from_table(model, {"a": [*axes, ("head.weight", 1)]})
    derived = permutation_spec(model, torch.zeros(1, 3, 1, 1))
    p = random_permutation(derived, 1)
    assert_same(apply_permutation(model, by_hand, p), apply_permutation(model, derived, p))


def test_mistakes_are_named() -> None:
    model = OURS["cifar, shortcut B"]()
    with pytest.raises(UserError, match="eval mode"):
        permutation_spec(model, torch.zeros(1, 3, 16, 16))
    model.eval()
    with pytest.raises(
        UserError, match=r"\(1, 1, 16, 16\) does not fit CifarResNet: module 'conv1'"
    ):
        permutation_spec(model, torch.zeros(1, 1, 16, 16))

    def branching(m: Net, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return m.head(x.flatten(1))

    inner = Net(branching, head=nn.Linear(192, 4))
    outer = Net(lambda m, x: m.inner(x), inner=inner).eval()
    with pytest.raises(UserError, match=r"cannot be traced: module 'inner'.*if x.sum\(\) > 0"):
        permutation_spec(outer, torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="give a tensor as the network takes it"):
        permutation_spec(model, (1, 3, 16, 16))  # type: ignore[arg-type]
    lazy = nn.Sequential(nn.LazyConv2d(4, 3)).eval()
    with pytest.raises(UserError, match="run lazy layers once"):
        permutation_spec(lazy, torch.zeros(1, 3, 8, 8))
    outer.forward = types.MethodType(lambda m, x: m.inner(x), outer)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="replaced on the instance"):
        permutation_spec(outer, torch.zeros(1, 3, 8, 8))

    class Opaque:
        __slots__ = ("logits",)

        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    net = Net(lambda m, x: Opaque(m.a(x)), a=conv(3, 6)).eval()
    with pytest.raises(UserError, match="returns a Opaque, in which no tensors are found"):
        permutation_spec(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="example_input: 8 is no shape"):
        example_input_for(model, 8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes 1 tensors, 2 came"):
        permutation_spec(model, (torch.zeros(1, 3, 16, 16), torch.zeros(1)))

    spec = permutation_spec(model, torch.zeros(1, 3, 16, 16))
    group = spec.groups[0]
    with pytest.raises(UserError, match=f"did you mean '{group.name}'"):
        apply_permutation(model, spec, {group.name + "x": torch.arange(group.size)})
    for wrong in (torch.tensor(0), torch.ones(group.size, dtype=torch.bool)):
        with pytest.raises(UserError, match=r"each of 0….*once, as int64"):
            apply_permutation(model, spec, {group.name: wrong})
    with pytest.raises(UserError, match="each of 0…"):
        apply_permutation(model, spec, {group.name: torch.zeros(group.size, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"does not have; did you mean 'conv1\.weight'"):
        spec_from_table(model, {"g": [("conv1.wieght", 0)]})
    with pytest.raises(UserError, match="one length"):
        spec_from_table(model, {"g": [("conv1.weight", 0), ("conv1.weight", 1)]})


def test_in_place_and_functional_spelling_change_nothing() -> None:
    def functional(m: Net, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, m.a.weight, m.a.bias, padding=1), inplace=True)
        x += 1
        y = F.max_pool2d(x, 2).view(x.size(0), -1)
        return F.linear(y, m.head.weight, m.head.bias)

    model = Net(functional, a=conv(3, 6), head=nn.Linear(96, 4)).eval()
    spec = permutation_spec(model, torch.zeros(2, 3, 8, 8))
    (group,) = spec.groups
    assert {(e.tensor, e.axis) for e in group.entries} == {
        ("a.weight", 0), ("a.bias", 0), ("head.weight", 1),
    }  # fmt: skip
    assert {e.positions.numel() for e in group.entries} == {6, 96}


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / a.norm()).detach())


def assert_same(a: nn.Module, b: nn.Module) -> None:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
