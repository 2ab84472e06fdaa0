"""The law of symmetry on networks drawn at random from everything that has a rule."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fusion.alignment import (
    align,
    apply_permutation,
    compose,
    inverse,
    permutation_spec,
    random_permutation,
)
from fusion.data import ImageTensors
from fusion.errors import UserError
from fusion.method import ZipIt
from fusion.modelpool import BaseModelPool

Step = Callable[["RandomNetwork", list[Tensor]], Tensor]  # not a closure: networks are copied
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOLS = {1: (nn.MaxPool1d, nn.AvgPool1d), 2: (nn.MaxPool2d, nn.AvgPool2d),
         3: (nn.MaxPool3d, nn.AvgPool3d)}  # fmt: skip
SIDES = {1: 12, 2: 6, 3: 4}


class StandardisedConv(nn.Conv2d):
    """A convolution whose filters are normalised in the forward pass, of any dimension."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, eps=1e-3).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1, groups=self.groups)


class RandomNetwork(nn.Module):
    """A stem, ``depth`` operations drawn from ``seed``, a head; earlier activations are reused.

    Drawn once: the forward pass is a fixed list of steps. Images have ``dims`` axes.
    """

    def __init__(self, seed: int, depth: int = 12, dims: int = 2) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.dims = dims
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.steps: list[Step] = []
        self.channels: list[int] = []  # of every activation so far; all are images of one size
        self.register_buffer("blur", torch.tensor([1.0, 2.0, 1.0]), persistent=False)
        self._module(self._conv(3, 8), None, 8)
        for _ in range(depth):
            self.draw.choice(OPERATIONS)(self)
        self.flat = self.draw.random() < 0.5
        features = self.channels[-1] * (2**dims if self.flat else 1)
        self.head = nn.Sequential(nn.Linear(features, 12), nn.GELU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for step in self.steps:
            kept.append(step(self, kept))
        pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
        last = pool[self.dims](kept[-1], 2 if self.flat else 1)
        return self.head(last.flatten(1))

    # -- parts -------------------------------------------------------------------------------------

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

    def _conv(self, n: int, out: int, groups: int = 1, kernel: int = 3) -> nn.Module:
        return CONVOLUTIONS[self.dims](n, out, kernel, padding=kernel // 2, groups=groups)

    def _scale(self, *shape: int) -> int:
        self.scales.append(nn.Parameter(torch.ones(shape)))
        return len(self.scales) - 1

    @property
    def _ones(self) -> list[int]:
        return [1] * self.dims

    # -- layers ------------------------------------------------------------------------------------

    def convolution(self) -> None:
        at, n = self._source()
        out = self.draw.choice([4, 8, 12])
        groups = self.draw.choice([g for g in (1, 1, 2, 4) if n % g == 0 and out % g == 0])
        self._module(self._conv(n, out, groups), at, out)

    def depthwise(self) -> None:
        at, n = self._source()
        self._module(self._conv(n, n, n), at, n)

    def multiplied_depthwise(self) -> None:
        at, n = self._source()
        if n <= 8:
            self._module(self._conv(n, 2 * n, n), at, 2 * n)

    def transposed(self) -> None:
        at, n = self._source()
        groups = 2 if n % 2 == 0 and self.draw.random() < 0.5 else 1
        self._module(TRANSPOSED[self.dims](n, 8, 3, padding=1, groups=groups), at, 8)

    def standardised(self) -> None:
        at, n = self._source()
        groups = self.draw.choice([g for g in (1, 2, n) if n % g == 0 and 12 % g == 0])
        if self.dims == 2:
            self._module(StandardisedConv(n, 12, 3, padding=1, groups=groups), at, 12)

    def parametrized(self) -> None:
        at, n = self._source()
        groups = 2 if n % 2 == 0 and self.draw.random() < 0.3 else 1
        conv = self._conv(n, 8, groups)
        if self.draw.random() < 0.5:
            conv = parametrizations.weight_norm(conv, dim=self.draw.choice([0, 1, 2]))
        else:
            conv = parametrizations.spectral_norm(conv)
        self._module(conv, at, 8)

    def norm(self) -> None:
        at, n = self._source()
        kinds: list[nn.Module] = [BATCH_NORMS[self.dims](n)]
        kinds += [INSTANCE_NORMS[self.dims](n, affine=a) for a in (True, False)]
        kinds += [nn.GroupNorm(g, n) for g in (1, 2, 4, n) if n % g == 0]
        kinds += [nn.LayerNorm([n, *[SIDES[self.dims]] * self.dims])]
        self._module(self.draw.choice(kinds), at, n)

    def layer_norm(self) -> None:
        at, n = self._source()
        self.layers.append(self.draw.choice([nn.LayerNorm, nn.RMSNorm])(n))
        place = len(self.layers) - 1
        self._add(lambda net, kept: net.layers[place](kept[at].movedim(1, -1)).movedim(-1, 1), n)

    def evolved_norm(self) -> None:
        """x sigmoid(v x) over the deviation of groups of channels (EvoNorm-S0)."""
        at, n = self._source()
        groups = self.draw.choice([g for g in (1, 2, 4, n) if n % g == 0])
        place = self._scale(n)

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            v = net.scales[place].view(1, -1, *net._ones)
            blocks = x.reshape(len(x), groups, n // groups, *x.shape[2:])
            axes = tuple(range(2, blocks.ndim))
            deviation = (blocks.var(axes, unbiased=False, keepdim=True) + 1e-3).sqrt()
            return x * (x * v).sigmoid() / deviation.expand(blocks.shape).reshape(x.shape)

        self._add(step, n)

    def response_norm(self) -> None:
        """Divide the norm of each channel by the mean of all (GRN of ConvNeXt V2)."""
        at, n = self._source()
        place = self._scale(1, n, *self._ones)

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            size = kept[at].norm(p=2, dim=tuple(range(2, kept[at].ndim)), keepdim=True)
            share = size / (size.mean(dim=1, keepdim=True) + 1e-6)
            return torch.addcmul(kept[at], net.scales[place], kept[at] * share)

        self._add(step, n)

    def activation(self) -> None:
        at, n = self._source()
        kinds = [nn.SiLU(), nn.PReLU(n), nn.PReLU(1), nn.LeakyReLU(0.1), nn.Softmax(1)]
        kinds += [nn.ReLU(inplace=True), nn.Hardswish(), nn.Dropout(0.5)]
        self._module(self.draw.choice(kinds), at, n)

    def pooling(self) -> None:
        at, n = self._source()
        self._module(self.draw.choice(POOLS[self.dims])(3, 1, 1), at, n)

    def resize(self) -> None:
        at, n = self._source()
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[self.dims]
        mode = self.draw.choice([mode, "nearest"])

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = F.interpolate(kept[at], scale_factor=2, mode=mode)
            return F.interpolate(x, size=kept[at].shape[2:], mode=mode)

        self._add(step, n)

    def blurred(self) -> None:
        """A fixed filter for all channels, padded by the shape of the image."""
        at, n = self._source()

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            missing = max((x.shape[-1] - 1) + 3 - x.shape[-1], 0)
            kernel = net.blur.view(1, 1, 3, *[1] * (net.dims - 1)).expand(n, *[-1] * (net.dims + 1))
            pad = [0, 0] * (net.dims - 1) + [missing // 2, missing - missing // 2]
            function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[net.dims]
            return function(F.pad(x, pad, mode="reflect" if net.dims < 3 else "constant"), kernel,
                            groups=n)  # fmt: skip

        self._add(step, n)

    def again(self) -> None:
        """Use a layer a second time, on an activation of the same width."""
        convolutions = [
            (i, m) for i, m in enumerate(self.layers)
            if isinstance(m, CONVOLUTIONS[self.dims]) and m.in_channels in self.channels
        ]  # fmt: skip
        if not convolutions:
            return
        place, layer = self.draw.choice(convolutions)
        fits = [i for i, n in enumerate(self.channels, 1) if n == layer.in_channels]
        at = self.draw.choice(fits)
        self._add(lambda net, kept: net.layers[place](kept[at]), layer.out_channels)

    # -- several activations -----------------------------------------------------------------------

    def _alike(self) -> tuple[int, int, int]:
        n = self.channels[-1]
        same = [i for i, m in enumerate(self.channels, 1) if m == n]
        return self.draw.choice(same), self.draw.choice(same), n

    def residual(self) -> None:
        a, b, n = self._alike()
        if self.draw.random() < 0.8:
            self._add(lambda net, kept: kept[a] + kept[b], n)
        else:
            self._add(lambda net, kept: kept[a] * torch.sigmoid(kept[b]), n)

    def concatenation(self) -> None:
        (a, n), (b, m) = self._source(), self._source()
        if n + m <= 24:
            self._add(lambda net, kept: torch.cat([kept[a], kept[b]], 1), n + m)

    def side_by_side(self) -> None:
        """One convolution over two activations put together in space."""
        a, b, n = self._alike()
        self.layers.append(self._conv(n, n))
        place = len(self.layers) - 1
        self._add(
            lambda net, kept: net.layers[place](torch.cat([kept[a], kept[b]], 2)).chunk(2, 2)[1], n
        )

    def ghost(self) -> None:
        """Channels and what a depthwise convolution makes of them, side by side."""
        at, n = self._source()
        if not 2 <= n <= 12:
            return
        self.layers.append(self._conv(n, n, n))
        place, cut = len(self.layers) - 1, self.draw.choice([2 * n, 2 * n - 2])
        self._add(
            lambda net, kept: torch.cat([kept[at], net.layers[place](kept[at])], 1)[:, :cut], cut
        )

    def selective(self) -> None:
        """A softmax decides, channel by channel, between two paths (selective kernels)."""
        a, b, n = self._alike()
        self.layers.append(nn.ModuleList([nn.Linear(n, 4), nn.Linear(4, 2 * n)]))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            paths = torch.stack([kept[a], kept[b]], dim=1)
            down, up = net.layers[place]
            told = up(down(paths.sum(1).flatten(2).mean(2)).relu())
            weight = told.view(len(told), 2, n, *net._ones).softmax(dim=1)
            return (paths * weight).sum(dim=1)

        self._add(step, n)

    def split_attention(self) -> None:
        """The same between the halves of one activation."""
        at, n = self._source()
        if n % 2 or n < 4:
            return
        self.layers.append(self._conv(n // 2, n, kernel=1))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at].reshape(len(kept[at]), 2, n // 2, *kept[at].shape[2:])
            pooled = x.sum(dim=1).flatten(2).mean(2).view(len(x), n // 2, *net._ones)
            weight = net.layers[place](pooled).view(len(x), 1, 2, -1).transpose(1, 2).softmax(1)
            return (x * weight.reshape(len(x), 2, n // 2, *net._ones)).sum(dim=1)

        self._add(step, n // 2)

    def global_context(self) -> None:
        """Add to every pixel a mean of all, weighted by a map (global context, GCNet)."""
        at, n = self._source()
        self.layers.append(self._conv(n, 1, kernel=1))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            weight = net.layers[place](x).flatten(2).softmax(-1)
            context = x.flatten(2) @ weight.transpose(1, 2)
            return x + context.view(len(x), n, *net._ones)

        self._add(step, n)

    def self_attention(self) -> None:
        at, n = self._source()
        heads = self.draw.choice([h for h in (1, 2) if n % h == 0])
        self.layers.append(nn.Linear(n, 3 * n))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            tokens = net.layers[place](x.flatten(2).transpose(1, 2))
            parts = tokens.reshape(len(x), -1, 3, heads, n // heads).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            weight = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            out = (weight @ v).transpose(1, 2).reshape(len(x), -1, n)
            return out.transpose(1, 2).reshape(x.shape)

        self._add(step, n)

    def covariance(self) -> None:
        """Products of all pairs of channels: attention between them, or some of the pairs."""
        at, n = self._source()
        kind = self.draw.choice(["attention", "neighbours", "triangle", "row"])

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            flat = F.normalize(x.flatten(2), dim=-1)
            pairs = flat @ flat.mT
            if kind == "attention":
                return (pairs.softmax(-1) @ flat).view_as(x)
            if kind == "neighbours":
                gate = pairs.diagonal(1, dim1=1, dim2=2).mean(1, keepdim=True)
            elif kind == "triangle":
                gate = pairs.tril().mean((1, 2)).view(-1, 1)
            else:
                gate = pairs[:, n // 2]
            return x * gate.view(len(x), -1, *net._ones)

        self._add(step, n)

    def squeeze_and_excitation(self) -> None:
        at, n = self._source()
        self.layers.append(nn.Sequential(nn.Linear(n, 3), nn.ReLU(), nn.Linear(3, n)))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            gate = net.layers[place](kept[at].flatten(2).mean(2)).sigmoid()
            return kept[at] * gate.view(len(gate), n, *net._ones)

        self._add(step, n)

    def neighbour_attention(self) -> None:
        """A gate from a convolution along the channels (ECA)."""
        at, n = self._source()
        self.layers.append(nn.Conv1d(1, 1, 3, padding=1))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            gate = net.layers[place](kept[at].flatten(2).mean(2).unsqueeze(1)).sigmoid()
            return kept[at] * gate.view(len(gate), n, *net._ones)

        self._add(step, n)

    def coordinate_attention(self) -> None:
        at, n = self._source()
        if self.dims != 2:
            return
        self.layers.append(nn.ModuleList([nn.Conv2d(n, 4, 1), *[nn.Conv2d(4, n, 1)] * 2]))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            first, rows, columns = net.layers[place]
            both = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], dim=2)
            h, w = first(both).relu().split([x.shape[2], x.shape[3]], dim=2)
            return x * rows(h).sigmoid() * columns(w.mT).sigmoid()

        self._add(step, n)

    def spatial_attention(self) -> None:
        at, n = self._source()
        gate = self.draw.choice([torch.mean, torch.amax, lambda x, **k: torch.max(x, **k)[0]])
        self._add(
            lambda net, kept: kept[at] * torch.sigmoid(gate(kept[at], dim=1, keepdim=True)), n
        )

    def numbers(self) -> None:
        """Numbers that are no parameters, some of them equal; and channels told by their place."""
        at, n = self._source()
        numbers = torch.tensor([float(self.draw.randint(1, 2)) for _ in range(n)])
        kind = self.draw.choice(["scale", "mean", "some", "one", "place"])

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            scaled = x * numbers.to(x.dtype).view(1, n, *net._ones)
            if kind == "scale":
                return scaled
            if kind == "mean":
                return x + scaled.mean(dim=1, keepdim=True)
            if kind == "some":
                return x + x[:, : n // 2].mean(dim=1, keepdim=True)
            if kind == "one":
                return x * x[:, n // 2 : n // 2 + 1].sigmoid()
            return x + x.argmax(dim=1, keepdim=True)

        self._add(step, n)

    # -- data that is moved ------------------------------------------------------------------------

    def halves(self) -> None:
        at, n = self._source()
        if n % 2 or n < 4:
            return
        kind = self.draw.choice(["swap", "first", "product", "sum", "shuffle", "copies", "glu"])

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            first, second = kept[at].chunk(2, dim=1)
            if kind == "swap":
                return torch.cat([second, first], 1)
            if kind == "product":
                return first * second
            if kind == "glu":
                return F.glu(kept[at], dim=1)
            if kind == "sum":
                return first + second
            if kind == "copies":
                return torch.cat([first, first], 1)
            if kind == "shuffle":
                x = kept[at].view(len(kept[at]), 2, n // 2, *kept[at].shape[2:])
                return x.transpose(1, 2).reshape(kept[at].shape)
            return first

        self._add(step, n if kind in ("swap", "shuffle", "copies") else n // 2)

    def slices(self) -> None:
        at, n = self._source()
        start = self.draw.randint(0, 2)
        if n >= 6:
            kept_channels = len(range(start, n, 2))
            self._add(lambda net, kept: kept[at][:, start::2], kept_channels)

    def written_into(self) -> None:
        at, n = self._source()
        axis = self.draw.choice([1, 2]) if n > 2 else 2

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at].clone()
            x.narrow(axis, 1, 2).mul_(3.0)
            x.select(axis, 0).copy_(x.select(axis, 1).tanh())
            return x

        self._add(step, n)

    def partly(self) -> None:
        """Convolve some of the channels (FasterNet)."""
        at, n = self._source()
        if n % 4 or n < 4:
            return
        self.layers.append(self._conv(n // 4, n // 4))
        place = len(self.layers) - 1

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            some, rest = kept[at].split([n // 4, n - n // 4], dim=1)
            return torch.cat([net.layers[place](some), rest], 1)

        self._add(step, n)

    def padding(self) -> None:
        at, n = self._source()
        if n <= 16:
            pad = [0, 0] * self.dims + [1, 2]
            self._add(lambda net, kept: F.pad(kept[at], pad), n + 3)

    def order(self) -> None:
        at, n = self._source()
        kind = self.draw.choice(["flip", "roll", "index", "running sum", "mirror"])
        order = torch.tensor(self.draw.sample(range(n), n))

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            if kind == "flip":
                return x.flip(1)
            if kind == "roll":
                return x.roll(1, dims=1)
            if kind == "index":
                return x[:, order]
            if kind == "mirror":
                return x.flip(2) + x
            return x.cumsum(dim=2)

        self._add(step, n)

    def pixels(self) -> None:
        at, n = self._source()
        if self.dims != 2 or n % 8:
            return
        kind = self.draw.choice(["there and back", "shuffle", "unfold"])

        def step(net: RandomNetwork, kept: list[Tensor]) -> Tensor:
            x = kept[at]
            if kind == "unfold":
                patches = F.unfold(x, 3, padding=1)
                return F.fold(patches, x.shape[2:], 3, padding=1)
            large = F.pixel_shuffle(x, 2)
            return F.avg_pool2d(large, 2) if kind == "shuffle" else F.pixel_unshuffle(large, 2)

        self._add(step, n // 4 if kind == "shuffle" else n)

    def scale(self) -> None:
        at, n = self._source()
        side = SIDES[self.dims]
        shapes = [(n, *self._ones), (), (1,), (n, *[side] * self.dims), (1, *[side] * self.dims)]
        place = self._scale(*self.draw.choice(shapes))
        self._add(lambda net, kept: kept[at] * net.scales[place], n)


OPERATIONS = [
    value
    for name, value in vars(RandomNetwork).items()
    if callable(value) and not name.startswith("_") and name != "forward"
]
DRAWN = [(seed, 10, dims) for dims, n in ((2, 50), (1, 20), (3, 10)) for seed in range(n)]


@pytest.mark.parametrize(("seed", "depth", "dims"), DRAWN)
def test_the_laws_of_symmetry(seed: int, depth: int, dims: int) -> None:
    check(seed, depth, dims)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), depth=st.integers(1, 24), dims=st.integers(1, 3))
def test_any_network_keeps_the_laws(seed: int, depth: int, dims: int) -> None:
    check(seed, depth, dims)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_laws_of_symmetry_often(dims: int) -> None:
    for seed in range(1000, 1500):
        check(seed, 10 + seed % 20, dims)


@pytest.mark.parametrize("seed", range(12))
def test_copies_are_zipped_to_the_network(seed: int) -> None:
    """Whatever a network is made of, its units are merged so that copies give its function."""
    torch.manual_seed(seed)
    model = RandomNetwork(seed, 8).eval()
    images = torch.randn(16, 3, SIDES[2], SIDES[2])
    data = ImageTensors(images, torch.arange(16) % 5, class_names=list("abcde"))
    pool = BaseModelPool(
        {"a": model, "b": copy.deepcopy(model)}, train_datasets={"_pretrained_": data}
    )
    method = ZipIt(
        folded=seed % 2 == 0, batch_norm="merge", within_budget=0.0, calibration_images=16
    )
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        with pytest.raises(UserError, match="is parametrized"):  # as in every merge
            method.run(pool)
        return
    with torch.no_grad():
        change = (method.run(pool).eval()(images) - model(images)).norm() / model(images).norm()
    assert change < 1e-4, f"seed {seed}: {change:.1e}"


def check(seed: int, depth: int, dims: int) -> None:
    torch.manual_seed(seed)
    model = RandomNetwork(seed, depth, dims).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor is not model.blur:
                # 0.5..1 with weights of both signs: nothing is zero or like another.
                sign = 1 if tensor.ndim == 1 else torch.randn(tensor.shape).sign()
                tensor.copy_((0.5 + 0.5 * torch.rand(tensor.shape)) * sign)
    side = SIDES[dims]
    x = torch.randn(2, 3, *[side] * dims, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    spec = permutation_spec(model, x[:1])
    drawn = random_permutation(spec, 1)
    permuted = apply_permutation(model, spec, drawn)
    with torch.no_grad():
        change = (permuted(x) - expected).norm() / expected.norm()
    assert change < 1e-11, f"seed {seed}, {dims} dims: {change:.1e}\n{spec}"
    back = inverse(spec, drawn)
    for same in (
        apply_permutation(permuted, spec, back),
        apply_permutation(model, spec, compose(spec, drawn, back)),
        align(permuted, model, spec=spec).model,
    ):
        for key, tensor in model.state_dict().items():
            assert torch.equal(same.state_dict()[key], tensor), f"seed {seed}, {dims} dims: {key}"
