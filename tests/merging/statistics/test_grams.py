"""Gram matrices against patches that torch's own convolutions read, for every kind of layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fusion.data import ImageTensors, batches
from fusion.merging.rule import Piece
from fusion.merging.statistics import collect, grams
from fusion.merging.statistics.grams import GramMatrix
from fusion.merging.statistics.patches import PatchProducts
from fusion.merging.statistics.reading import read_input
from fusion.merging.statistics.shifts import ShiftedProducts
from fusion.models import Layer, find_layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (7, 3, 5, 6)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (7, 4, 5, 6)),
    "1x1 strided, padded": (lambda: nn.Conv2d(4, 6, 1, stride=3, padding=1), (7, 4, 5, 6)),
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (7, 4, 5, 6)),
    "3x3 without bias": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (7, 4, 5, 6)),
    "3x3 on one pixel": (lambda: nn.Conv2d(4, 6, 3, padding=1), (7, 4, 1, 1)),
    "3x3 valid": (lambda: nn.Conv2d(4, 6, 3), (7, 4, 5, 6)),
    "3x3 padded by 3": (lambda: nn.Conv2d(4, 6, 3, padding=3), (7, 4, 2, 6)),
    "3x3 strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (7, 4, 8, 7)),
    "7x7 stem": (lambda: nn.Conv2d(3, 6, 7, stride=2, padding=3), (4, 3, 16, 15)),
    "2x3, all options": (
        lambda: nn.Conv2d(4, 6, (2, 3), (3, 2), (1, 2), (2, 1), groups=2),
        (7, 4, 9, 8),
    ),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, padding=4, dilation=4), (7, 4, 5, 9)),
    "1x3": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (7, 4, 5, 6)),
    "even, same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (7, 4, 5, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (7, 4, 5, 6)),
    "circular, same": (
        lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
        (7, 4, 5, 6),
    ),
    "replicate, strided": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="replicate"),
        (7, 4, 5, 6),
    ),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (7, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (7, 4, 5, 6)),
    "1-D": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (7, 4, 9)),
    "3-D": (lambda: nn.Conv3d(4, 6, (3, 1, 2), stride=(1, 2, 1), padding=1), (3, 4, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (7, 4, 4, 5)),
    "transposed, strided": (
        lambda: nn.ConvTranspose2d(4, 6, (4, 2), stride=(2, 3), padding=1, output_padding=1),
        (7, 4, 4, 5),
    ),
    "transposed, all options": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 2, output_padding=1, groups=2, dilation=2),
        (7, 4, 4, 5),
    ),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (7, 4, 6)),
}
layers = pytest.mark.parametrize("name", LAYERS)
by = pytest.mark.parametrize("few", [1, 1000], ids=["shifts", "patches"])


def case(name: str) -> tuple[nn.Module, Tensor]:
    """A layer in float64 and inputs of different size in each channel, some of them zero."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
        values = torch.randn(shape, dtype=torch.float64).add(0.5).relu()
    return module, values


def piece_of(module: nn.Module) -> Piece:
    transposed = getattr(module, "transposed", False)
    kind = "linear" if isinstance(module, nn.Linear) else "conv_transpose" if transposed else "conv"
    layer = Layer("", "weight", ("weight",), getattr(module, "groups", 1), kind, ())
    return Piece("weight", layer, 0.0, None, module.weight.detach()[None], ("a",), (1.0,))


def matrix_with_bias(module: nn.Module) -> Tensor:
    """W̃ of each group, (g, out/g, d + 1)."""
    rows = piece_of(module).matrices(module.weight.detach())
    bias = rows.new_zeros(rows.shape[:2].numel()) if module.bias is None else module.bias.detach()
    return torch.cat([rows, bias.view(*rows.shape[:2], 1)], -1)


def outputs_by_unit(module: nn.Module, output: Tensor) -> Tensor:
    axis = -1 if isinstance(module, nn.Linear) else 1
    return output.movedim(axis, 0).flatten(1)


@torch.no_grad()
def patches_of(module: nn.Module, values: Tensor) -> Tensor:
    """The patches (g, positions, d + 1): what the layer returns with one-hot weights, and a 1."""
    piece = piece_of(module)
    groups, _, columns = piece.matrices(module.weight).shape
    reader = copy.deepcopy(module)
    one_hot = torch.eye(columns, dtype=torch.float64).expand(groups, -1, -1)
    if isinstance(module, nn.Linear):
        shape = one_hot.shape[1:]
    elif module.transposed:
        shape = (module.weight.shape[0], columns, *module.weight.shape[2:])
    else:
        shape = (groups * columns, *module.weight.shape[1:])
    like = Piece("weight", piece.layer, 0.0, None, torch.zeros(1, *shape), ("a",), (1.0,))
    reader.weight = nn.Parameter(like.from_matrices(one_hot.contiguous()).contiguous())
    reader.bias = None
    if not isinstance(module, nn.Linear):
        reader.out_channels = groups * columns
    read = outputs_by_unit(module, reader(values)).view(groups, columns, -1)
    return F.pad(read.mT, (0, 1), value=1.0)


def gram_of(module: nn.Module, values: Tensor, batch: int = 4) -> Tensor:
    gram = GramMatrix()
    for some in values.split(batch):
        gram.add(module, some, module(some))
    return gram.mean()


@by
@layers
def test_they_are_the_mean_products_of_patches(name, few, monkeypatch) -> None:
    monkeypatch.setattr(grams, "_FEW_CHANNELS", few)
    module, values = case(name)
    patches = patches_of(module, values)
    gram = gram_of(module, values)
    assert_close(gram, patches.mT @ patches / patches.shape[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, gram.mT)
    assert bool((gram[:, -1, -1] == 1).all())


@by
@layers
@torch.no_grad()
def test_they_give_the_mean_squares_of_the_outputs(name, few, monkeypatch) -> None:
    monkeypatch.setattr(grams, "_FEW_CHANNELS", few)
    module, values = case(name)
    weight, gram = matrix_with_bias(module), gram_of(module, values)
    units = outputs_by_unit(module, module(values))
    assert_close((weight @ gram * weight).sum(-1).flatten(), units.square().mean(1))
    assert_close((weight @ gram)[..., -1].flatten(), units.mean(1))


@pytest.mark.parametrize("kind", [ShiftedProducts, PatchProducts])
@pytest.mark.parametrize("name", ["3x3", "7x7 stem", "2x3, all options", "transposed", "3-D"])
@torch.no_grad()
def test_memory_limits_change_nothing_but_the_rounding(name, kind) -> None:
    module, values = case(name)
    reading = read_input(module, values, module(values))
    _, groups, channels = reading.values.shape[:3]
    totals = []
    for limit in (1, 1 << 12, 1 << 30):
        products = kind(reading.axes, groups, channels, limit=limit)
        for some in reading.values.split(5):
            products.add(some)
        totals.append(products.total())
    assert_close(totals[0], totals[2], rtol=1e-12, atol=1e-12)
    assert_close(totals[1], totals[2], rtol=1e-12, atol=1e-12)


@by
@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise", "7x7 stem", "linear on tokens"])
def test_float32_is_exact_to_a_few_millionths(name, few, monkeypatch) -> None:
    """Relative to the roots of the diagonal, as a correlation matrix."""
    monkeypatch.setattr(grams, "_FEW_CHANNELS", few)
    module, values = case(name)
    values = values.repeat(50, *[1] * (values.ndim - 1))
    values += 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    exact = gram_of(module, values.float().double(), batch=500)
    rounded = gram_of(module.float(), values.float(), batch=500)
    scale = exact.diagonal(dim1=1, dim2=2).sqrt()
    error = (rounded - exact).abs() / (scale[:, :, None] * scale[:, None])
    assert rounded.dtype == torch.float64
    assert float(error.nan_to_num().max()) < 5e-6


def test_images_of_several_sizes_count_by_their_positions() -> None:
    module, values = case("3x3")
    gram = GramMatrix()
    both = [values, values[:, :, :3, :4].contiguous()]
    for some in both:
        gram.add(module, some, module(some))
    patches = torch.cat([patches_of(module, some) for some in both], 1)
    assert_close(gram.mean(), patches.mT @ patches / patches.shape[1])


def test_convolutions_without_a_batch_dimension() -> None:
    module, values = case("3x3")
    gram = GramMatrix()
    gram.add(module, values[0], module(values[0]))
    patches = patches_of(module, values[:1])
    assert_close(gram.mean(), patches.mT @ patches / patches.shape[1])


class Tied(nn.Module):
    """A layer that runs twice, two that share a weight, one that is a function, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.shared = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.shared.weight = self.again.weight
        self.own = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.own_padding = OwnPadding(4, 4, 3)
        self.head = nn.Linear(4, 10)
        self.auxiliary = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.again(x)) + x
        x = torch.relu(self.again(x)) + x
        x = torch.relu(self.shared(x)) + F.conv2d(x, self.own)
        features = self.own_padding(x).mean((2, 3))
        if self.training:
            return self.head(features) + self.auxiliary(features)
        return self.head(features)


class OwnPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 2, 0, 2)))


def inputs_of(module: nn.Module, model: nn.Module, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0].double()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen


def test_every_call_of_a_tied_weight_counts(train_digits: ImageTensors) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied().eval()
    images = train_digits.normalise(train_digits.images[:20])
    layers = find_layers(model)
    data = [(part, torch.zeros(len(part))) for part in images.split(8)]
    found = collect(model, data, {"gram"}, layers=layers)
    names = {"first.weight", "again.weight", "head.weight"}
    assert found.keys() == names
    assert {layer.weight for layer in layers} == names | {
        "own",
        "own_padding.weight",
        "auxiliary.weight",
    }
    calls = [(model.again, x) for x in inputs_of(model.again, model, images)]
    calls += [(model.shared, x) for x in inputs_of(model.shared, model, images)]
    assert len(calls) == 3
    patches = torch.cat([patches_of(m.double(), x) for m, x in calls], 1)
    expected = patches.mT @ patches / patches.shape[1]
    assert_close(found["again.weight"]["gram"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_network_is_the_same_afterwards(base, dtype, train_digits, equal) -> None:
    """Half precision is widened for the pass, and every layer has its matrix."""
    base = base.to(dtype)
    before = copy.deepcopy(base)
    base.train()
    layers = find_layers(base)
    data = train_digits.select(torch.arange(40))
    found = collect(base, batches(data, batch_size=16), {"gram"}, layers=layers)
    assert found.keys() == {layer.weight for layer in layers}
    assert equal(base, before)
    assert all(module.training for module in base.modules())
    assert all(p.is_contiguous() and p.grad is None for p in base.parameters())
    wide = before.to(torch.promote_types(dtype, torch.float32)).eval()
    images = data.normalise(data.images).to(next(wide.parameters()).dtype)
    for layer in layers:
        module = wide.get_submodule(layer.name)
        outputs = []
        handle = module.register_forward_hook(lambda *call, into=outputs: into.append(call[2]))
        with torch.no_grad():
            wide(images)
        handle.remove()
        weight = matrix_with_bias(module).double()
        gram = found[layer.weight]["gram"]
        squares = outputs_by_unit(module, outputs[0]).double().square().mean(1)
        assert_close((weight @ gram * weight).sum(-1).flatten(), squares, rtol=1e-4, atol=1e-7)
