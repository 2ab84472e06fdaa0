"""The law of symmetry on networks drawn at random from everything that has a rule."""

from __future__ import annotations

import random
from collections.abc import Callable

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
)

Step = Callable[["RandomNetwork", list[Tensor]], Tensor]  # not a closure: networks are copied


class RandomNetwork(nn.Module):
    """A stem, ``depth`` operations drawn from ``seed``, a head; earlier activations are reused.

    Drawn once: the forward pass is a fixed list of steps, so that it can be traced.
    """

    def __init__(self, seed: int, depth: int = 12) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.steps: list[Step] = []
        self.channels: list[int] = []  # of every activation so far; all are images of one size
        self._module(nn.Conv2d(3, 8, 3, padding=1), None, 8)
        for _ in range(depth):
            self.draw.choice(OPERATIONS)(self)
        self.flat = self.draw.random() < 0.5
        features = self.channels[-1] * (16 if self.flat else 1)
        self.head = nn.Sequential(nn.Linear(features, 12), nn.GELU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for step in self.steps:
            kept.append(step(self, kept))
        last = F.adaptive_avg_pool2d(kept[-1], 4 if self.flat else 1)
        return self.head(last.flatten(1))

    # -- operations --------------------------------------------------------------------------------

    def _add(self, step: Step, channels: int) -> None:
        self.steps.append(step)
        self.channels.append(channels)

    def _module(self, module: nn.Module, at: int | None, channels: int) -> None:
        self.layers.append(module)
        place = len(self.layers) - 1
        source = 0 if at is None else at
        self._add(lambda net, kept: net.layers[place](kept[source]), channels)

    def _source(self) -> tuple[int, int]:
        """Return an activation (most often the last) and its channels."""
        last = len(self.channels)
        at = last if self.draw.random() < 0.7 else self.draw.randint(1, last)
        return at, self.channels[at - 1]

    def convolution(self) -> None:
        at, n = self._source()
        out = self.draw.choice([4, 8, 12])
        groups = self.draw.choice([g for g in (1, 1, 2, 4) if n % g == 0 and out % g == 0])
        self._module(nn.Conv2d(n, out, 3, padding=1, groups=groups), at, out)

    def depthwise(self) -> None:
        at, n = self._source()
        self._module(nn.Conv2d(n, n, 3, padding=1, groups=n), at, n)

    def multiplied_depthwise(self) -> None:
        at, n = self._source()
        if n <= 8:
            self._module(nn.Conv2d(n, 2 * n, 3, padding=1, groups=n), at, 2 * n)

    def transposed(self) -> None:
        at, n = self._source()
        groups = 2 if n % 2 == 0 and self.draw.random() < 0.5 else 1
        self._module(nn.ConvTranspose2d(n, 8, 3, padding=1, groups=groups), at, 8)

    def norm(self) -> None:
        at, n = self._source()
        kinds: list[nn.Module] = [nn.BatchNorm2d(n), nn.InstanceNorm2d(n, affine=True)]
        kinds += [nn.GroupNorm(g, n) for g in (1, 2, 4) if n % g == 0]
        self._module(self.draw.choice(kinds), at, n)

    def layer_norm(self) -> None:
        at, n = self._source()
        self.layers.append(nn.LayerNorm(n))
        place = len(self.layers) - 1
        self._add(
            lambda net, kept: net.layers[place](kept[at].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n
        )

    def activation(self) -> None:
        at, n = self._source()
        kinds = [nn.SiLU(), nn.PReLU(n), nn.PReLU(1), nn.LeakyReLU(0.1), nn.Softmax2d()]
        self._module(self.draw.choice(kinds), at, n)

    def pooling(self) -> None:
        at, n = self._source()
        self._module(self.draw.choice([nn.MaxPool2d, nn.AvgPool2d])(3, 1, 1), at, n)

    def again(self) -> None:
        """Use a layer a second time, on an activation of the same width."""
        convolutions = [
            (i, m) for i, m in enumerate(self.layers) if isinstance(m, nn.Conv2d) and i > 0
        ]
        if not convolutions:
            return
        place, layer = self.draw.choice(convolutions)
        fits = [i for i, n in enumerate(self.channels, 1) if n == layer.in_channels]
        at = self.draw.choice(fits)
        self._add(lambda net, kept: net.layers[place](kept[at]), layer.out_channels)

    def residual(self) -> None:
        n = self.channels[-1]
        same = [i for i, m in enumerate(self.channels, 1) if m == n]
        a, b = self.draw.choice(same), self.draw.choice(same)
        if self.draw.random() < 0.8:
            self._add(lambda net, kept: kept[a] + kept[b], n)
        else:
            self._add(lambda net, kept: kept[a] * torch.sigmoid(kept[b]), n)

    def concatenation(self) -> None:
        (a, n), (b, m) = self._source(), self._source()
        if n + m <= 24:
            self._add(lambda net, kept: torch.cat([kept[a], kept[b]], 1), n + m)

    def halves(self) -> None:
        at, n = self._source()
        if n % 2:
            return
        kind = self.draw.choice(["swap", "first", "product", "sum", "shuffle"])

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            first, second = kept[at].chunk(2, dim=1)
            if kind == "swap":
                return torch.cat([second, first], 1)
            if kind == "product":
                return first * second
            if kind == "sum":
                return first + second
            if kind == "shuffle":
                size, _, height, width = kept[at].shape
                mixed = kept[at].view(size, 2, n // 2, height, width).transpose(1, 2)
                return mixed.reshape(size, n, height, width)
            return first

        self._add(step, n if kind in ("swap", "shuffle") else n // 2)

    def slices(self) -> None:
        at, n = self._source()
        start = self.draw.randint(0, 2)
        if n >= 6:
            kept_channels = len(range(start, n, 2))
            self._add(lambda net, kept: kept[at][:, start::2], kept_channels)

    def padding(self) -> None:
        at, n = self._source()
        if n <= 16:
            self._add(lambda net, kept: F.pad(kept[at], (0, 0, 0, 0, 1, 2)), n + 3)

    def order(self) -> None:
        at, n = self._source()
        if self.draw.random() < 0.5:
            self._add(lambda net, kept: kept[at].flip(1), n)
        else:
            self._add(lambda net, kept: kept[at].roll(1, dims=1), n)

    def pixels(self) -> None:
        at, n = self._source()
        if n % 4 == 0:
            self._add(
                lambda net, kept: F.avg_pool2d(
                    F.pixel_unshuffle(F.pixel_shuffle(kept[at], 2), 2), 1
                ),
                n,
            )

    def squeeze_and_excitation(self) -> None:
        at, n = self._source()
        self.layers.append(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, 3, 1), nn.ReLU(), nn.Conv2d(3, n, 1),
                nn.Hardsigmoid(),
            )
        )  # fmt: skip
        place = len(self.layers) - 1
        self._add(lambda net, kept: kept[at] * net.layers[place](kept[at]), n)

    def spatial_attention(self) -> None:
        at, n = self._source()
        gate = self.draw.choice([torch.mean, torch.amax])
        self._add(
            lambda net, kept: kept[at] * torch.sigmoid(gate(kept[at], dim=1, keepdim=True)), n
        )

    def scale(self) -> None:
        at, n = self._source()
        self.scales.append(nn.Parameter(torch.ones(n, 1, 1)))
        place = len(self.scales) - 1
        self._add(lambda net, kept: kept[at] * net.scales[place], n)


OPERATIONS = [
    value
    for name, value in vars(RandomNetwork).items()
    if callable(value) and not name.startswith("_") and name != "forward"
]


# The last one rolls the channels between two grouped convolutions: the places of the units inside
# one block are not in the order of the pass.
@pytest.mark.parametrize(("seed", "depth"), [*((seed, 12) for seed in range(40)), (2335, 30)])
def test_the_laws_of_symmetry(seed: int, depth: int) -> None:
    torch.manual_seed(seed)
    model = RandomNetwork(seed, depth).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                # 0.5..1 with weights of both signs: nothing is zero or like another.
                sign = 1 if tensor.ndim == 1 else torch.randn(tensor.shape).sign()
                tensor.copy_((0.5 + 0.5 * torch.rand(tensor.shape)) * sign)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    spec = permutation_spec(model, x)
    assert spec.groups
    drawn = random_permutation(spec, 1)
    permuted = apply_permutation(model, spec, drawn)
    with torch.no_grad():
        change = (permuted(x) - expected).norm() / expected.norm()
    assert change < 1e-12, f"{change:.1e}\n{spec}"
    back = inverse(spec, drawn)
    for same in (
        apply_permutation(permuted, spec, back),
        apply_permutation(model, spec, compose(spec, drawn, back)),
        align(permuted, model, spec=spec).model,
    ):
        for key, tensor in model.state_dict().items():
            assert torch.equal(same.state_dict()[key], tensor), key
