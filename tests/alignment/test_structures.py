"""Structures of networks beyond torchvision's classifiers, one small member of each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import roi_align

from fusion.alignment import (
    align,
    apply_permutation,
    inverse,
    permutation_spec,
    random_permutation,
)

ENDS = {"input", "output", "being one number"}  # fixed in every network


class Net(nn.Module):
    """Named parts and a forward pass given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def conv(n: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(n, out, kernel, padding=kernel // 2, **options)


def head(m: Net, x: Tensor) -> Tensor:
    return m.head(x.flatten(2).mean(2))


def chain(forward: Callable[[Net, Tensor], Tensor], n: int = 8, **parts: Any) -> nn.Module:
    """A convolution to 8 channels, ``forward`` of what it makes, and a head on ``n`` channels."""
    whole = lambda m, x: head(m, forward(m, m.stem(x)))  # noqa: E731
    return Net(whole, stem=conv(3, 8), head=nn.Linear(n, 4), **parts)


# -- weights that are computed ---------------------------------------------------------------------


class StandardisedConv(nn.Conv2d):
    """Filters of mean zero and unit variance, scaled (Brock et al., 2021, 2101.08692)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.7).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class CentredConv(nn.Conv2d):
    """Weight standardisation by variance and mean (Qiao et al., 2019, 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, correction=0)
        weight = (self.weight - mean) / (var + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


def kinds_of(kind: Callable[..., nn.Module]) -> nn.Module:
    """Full, grouped and depthwise convolutions of one kind."""
    return chain(
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
        a=kind(8, 8, 3, padding=1), b=kind(8, 8, 3, padding=1, groups=2),
        c=kind(8, 8, 3, padding=1, groups=8),
    )  # fmt: skip


def hooked_weight_norm(*args: Any, **options: Any) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(*args, **options))


def reparametrised(m: Net, x: Tensor) -> Tensor:
    return (m.wide(x) + m.narrow(x) + m.norm(x)).relu()


# -- norms and gates -------------------------------------------------------------------------------


def response_norm(m: Net, x: Tensor) -> Tensor:
    size = x.norm(p=2, dim=(2, 3), keepdim=True)
    return torch.addcmul(m.shift, m.scale, x * (size / (size.mean(dim=1, keepdim=True) + 1e-6))) + x


def evolved_norm(m: Net, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    var = x.reshape(n, 2, c // 2, h, w).var(dim=(2, 3, 4), unbiased=False, keepdim=True)
    deviation = (var + 1e-5).sqrt().expand(n, 2, c // 2, h, w).reshape(n, c, h, w)
    return x * (x * m.scale.view(1, -1, 1, 1)).sigmoid() / deviation * m.gain.view(1, -1, 1, 1)


def neighbours(m: Net, x: Tensor) -> Tensor:
    gate = m.gate(x.mean((2, 3)).view(len(x), 1, -1)).sigmoid()
    return m.b(x * gate.view(len(x), -1, 1, 1).expand_as(x))


def global_context(m: Net, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    weight = m.mask(x).view(n, 1, h * w).softmax(-1).unsqueeze(3)
    context = torch.matmul(x.view(n, 1, c, h * w), weight).view(n, c, 1, 1)
    return x + m.up(F.layer_norm(m.down(context).movedim(1, -1), (4,)).movedim(-1, 1).relu())


def split_attention(m: Net, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    n, c, h, w = x.shape
    paths = x.reshape(n, 2, c // 2, h, w)
    told = m.up(m.down(paths.sum(dim=1).mean((2, 3), keepdim=True)).relu())
    weight = F.softmax(told.view(n, 1, 2, -1).transpose(1, 2), dim=1).reshape(n, 2, c // 2, 1, 1)
    return (paths * weight).sum(dim=1).contiguous()


def selective_kernel(m: Net, x: Tensor) -> Tensor:
    paths = torch.stack([m.a(x), m.b(x)], dim=1)
    n, k, c = paths.shape[:3]
    told = m.up(m.down(paths.sum(1).mean((2, 3), keepdim=True)).relu())
    return torch.sum(paths * torch.softmax(told.view(n, k, c, 1, 1), dim=1), dim=1)


def coordinates(m: Net, x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    both = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], dim=2)
    rows, columns = m.down(both).relu().split([h, w], dim=2)
    return x * m.rows(rows).sigmoid() * m.columns(columns.transpose(2, 3)).sigmoid()


def windows(m: Net, x: Tensor) -> Tensor:
    """Attention within windows, with a table of biases read by position."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    q, k, v = m.qkv(x).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
    bias = m.table[m.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
    x = ((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
    return (
        m.project(x).view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    )


def windowed() -> nn.Module:
    net = chain(windows, qkv=nn.Linear(8, 24), project=nn.Linear(8, 8),
                table=nn.Parameter(torch.zeros(49, 2)))  # fmt: skip
    net.register_buffer("index", torch.arange(256).view(16, 16) % 49)
    return net


def recurrent(m: Net, x: Tensor) -> Tensor:
    """A recurrent layer over the rows, in both directions."""
    rows = m.over(x.mean(3).transpose(1, 2))[0]
    return m.b(x + rows.transpose(1, 2).unsqueeze(3))


def frequencies(m: Net, x: Tensor) -> Tensor:
    """A filter for each channel in Fourier space (GFNet, Rao et al., 2021, 2107.00645)."""
    return torch.fft.irfft2(torch.fft.rfft2(m.a(x)) * torch.view_as_complex(m.filter))


def gates(m: Net, x: Tensor) -> Tensor:
    """Contexts, each times one channel of its own (focal modulation, 2203.11926)."""
    for name in "abcd":
        context, gate = m.get_submodule(name)(x).split([8, 1], dim=1)
        x = x + (context * gate).relu() * gate
    return x


# -- channels that are moved -----------------------------------------------------------------------


def same_padding(m: Net, x: Tensor) -> Tensor:
    """Pad as TensorFlow does, by as much as the shape needs."""
    need = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in x.shape[-2:]]
    pad = [need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2]
    return F.conv2d(F.pad(x, pad), m.a.weight, m.a.bias, stride=2)


def ghost(m: Net, x: Tensor) -> Tensor:
    first = m.a(x)
    return torch.cat([first, m.b(first)], dim=1)[:, :14] + m.shortcut(x)


def aggregated(m: Net, x: Tensor) -> Tensor:
    first = m.a(x).relu()
    return m.root(torch.cat([m.b(first) + first, first], dim=1))


def space_to_depth(m: Net, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous()
    return m.a(x.view(n, c * 4, h // 2, w // 2))


def up_and_across(m: Net, x: Tensor) -> Tensor:
    """A decoder step: transposed convolution, skip connection, concatenation (U-Net)."""
    small = m.down(x).relu()
    large = m.up(small)
    shape = [large.shape[2], large.shape[3]]
    large = torch.cat([large, F.interpolate(small, size=shape, mode="nearest")], dim=1)
    return m.b(torch.cat([x, large], dim=1))


def pyramid(m: Net, x: Tensor) -> Tensor:
    small = m.small(m.down(x).relu())
    large = m.large(x) + F.interpolate(small, scale_factor=2.0, mode="bilinear")
    return torch.cat([m.smooth(large).flatten(2), m.smooth(small).flatten(2)], dim=2)


def written(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    x[:, :4] = x[:, 4:].sigmoid()
    x[:, :, 0].mul_(2)
    return x


@dataclasses.dataclass
class Output:
    """What some libraries return."""

    logits: Tensor
    features: list[Tensor]


def dataclass_output(m: Net, x: Tensor) -> Any:
    x = m.stem(x).relu()
    return Output(m.head(m.a(x).mean((2, 3))), [m.b(x)])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def correlated(m: Net, a: Tensor, b: Tensor) -> Tensor:
    """Features of two images compared pixel by pixel, read where a flow points (RAFT)."""
    both = m.stem(torch.cat([a, b], dim=0))
    first, second = both.chunk(2, dim=0)
    n, c, h, w = first.shape
    volume = first.view(n, c, h * w).transpose(1, 2) @ second.view(n, c, h * w)
    volume = F.avg_pool2d(volume.view(n * h * w, 1, h, w), 2)
    grid = m.flow(first).permute(0, 2, 3, 1).reshape(n * h * w, 1, 1, 2)
    read = F.grid_sample(volume, grid, align_corners=True).view(n, h, w, 1).permute(0, 3, 1, 2)
    return m.head(m.mix(torch.cat([first, read], dim=1)).relu().mean((2, 3)))


def wave(n: int, out: int, kernel: int, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(n, out, kernel, padding=kernel // 2, **options)


def encoder(m: Net, x: Tensor) -> Tensor:
    x = F.gelu(m.group(m.stem(x)))
    x = F.gelu(m.layer(m.a(x).transpose(1, 2)))
    position = m.position(m.project(x).transpose(1, 2))[:, :, :-1]
    return m.head((m.project(x) + F.gelu(position).transpose(1, 2)).mean(1))


Case = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], set[str]]
IMAGE = ((3, 12, 12),)
STRUCTURES: dict[str, Case] = {
    "scaled standardised convolution": (lambda: kinds_of(StandardisedConv), IMAGE, set()),
    "standardised convolution": (lambda: kinds_of(CentredConv), IMAGE, set()),
    "weight norm": (
        lambda: kinds_of(lambda *a, **k: parametrizations.weight_norm(nn.Conv2d(*a, **k))),
        IMAGE, set(),
    ),
    "weight norm, by hooks": (lambda: kinds_of(hooked_weight_norm), IMAGE, set()),
    "spectral norm": (
        lambda: kinds_of(lambda *a, **k: parametrizations.spectral_norm(nn.Conv2d(*a, **k))),
        # One vector serves the columns of all groups.
        IMAGE, {"b.parametrizations.weight.0 (mv)"},
    ),
    "reparametrised block": (
        lambda: chain(reparametrised, wide=nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)),
                      narrow=nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8)),
                      norm=nn.BatchNorm2d(8)), IMAGE, set(),
    ),
    "skip gain": (
        lambda: chain(lambda m, x: m.a(x) * m.gain + x, a=conv(8, 8),
                      gain=nn.Parameter(torch.zeros(()))), IMAGE, set(),
    ),
    "global response norm": (
        lambda: chain(response_norm, scale=nn.Parameter(torch.zeros(1, 8, 1, 1)),
                      shift=nn.Parameter(torch.zeros(1, 8, 1, 1))), IMAGE, set(),
    ),
    "evolved norm": (
        lambda: chain(evolved_norm, scale=nn.Parameter(torch.ones(8)),
                      gain=nn.Parameter(torch.ones(8))), IMAGE, set(),
    ),
    "instance and group norm": (
        lambda: chain(lambda m, x: m.group(m.a(m.instance(x)).relu()),
                      instance=nn.InstanceNorm2d(8, affine=True), a=conv(8, 8),
                      group=nn.GroupNorm(2, 8)), IMAGE, set(),
    ),
    "gate along the channels": (
        lambda: chain(neighbours, gate=nn.Conv1d(1, 1, 3, padding=1, bias=False), b=conv(8, 8)),
        IMAGE, {"gate (convolution) along the channels"},
    ),
    "global context": (
        lambda: chain(global_context, mask=conv(8, 1, 1), down=conv(8, 4, 1), up=conv(4, 8, 1)),
        IMAGE, set(),
    ),
    "split attention": (
        lambda: chain(split_attention, a=conv(8, 16, groups=2), down=conv(8, 4, 1),
                      up=conv(4, 16, 1)), IMAGE, set(),
    ),
    "selective kernel": (
        lambda: chain(selective_kernel, a=conv(8, 8), b=conv(8, 8, 5), down=conv(8, 4, 1),
                      up=conv(4, 16, 1)), IMAGE, set(),
    ),
    "coordinate attention": (
        lambda: chain(coordinates, down=conv(8, 4, 1), rows=conv(4, 8, 1), columns=conv(4, 8, 1)),
        IMAGE, set(),
    ),
    "attention in windows": (windowed, IMAGE, set()),
    "recurrent layer": (
        lambda: chain(recurrent, b=conv(8, 8),
                      over=nn.LSTM(8, 4, batch_first=True, bidirectional=True)), IMAGE, set(),
    ),
    "filter in Fourier space": (
        lambda: chain(frequencies, a=conv(8, 8), filter=nn.Parameter(torch.zeros(8, 12, 7, 2))),
        IMAGE, set(),
    ),
    "gates of one channel": (
        lambda: chain(gates, **{name: conv(8, 9) for name in "abcd"}), IMAGE,
        {"no other unit being like it"},
    ),
    # The units of a block come in an order that is not that of the first convolution.
    "rolled between groups": (
        lambda: chain(lambda m, x: m.b(m.a(x).roll(1, 1)), a=conv(8, 12),
                      b=conv(12, 8, groups=4)),
        IMAGE, set(),
    ),
    "padding by shape": (lambda: chain(same_padding, a=conv(8, 8)), ((3, 9, 9),), set()),
    "fixed blur": (
        lambda: blurred(), IMAGE, set(),
    ),
    "ghost": (
        lambda: chain(ghost, 14, a=conv(8, 7), b=conv(7, 7, groups=7), shortcut=conv(8, 14)),
        IMAGE, set(),
    ),
    "aggregation": (
        lambda: chain(aggregated, a=conv(8, 6), b=conv(6, 6), root=conv(12, 8)), IMAGE, set(),
    ),
    "space to depth": (lambda: chain(space_to_depth, a=conv(32, 8)), IMAGE, set()),
    "pixel shuffle": (
        lambda: chain(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(8, 24), b=conv(6, 8)),
        IMAGE, set(),
    ),
    "decoder with skips": (
        lambda: chain(up_and_across, down=conv(8, 6, stride=2), b=conv(22, 8),
                      up=nn.ConvTranspose2d(6, 8, 2, stride=2)), IMAGE, set(),
    ),
    "feature pyramid": (
        lambda: chain(pyramid, down=conv(8, 6, stride=2), small=conv(6, 8, 1), large=conv(8, 8, 1),
                      smooth=conv(8, 8)), IMAGE, set(),
    ),
    "written in place": (lambda: chain(written, a=conv(8, 8)), IMAGE, set()),
    "dataclass output": (
        lambda: Net(dataclass_output, stem=conv(3, 8), a=conv(8, 6), b=conv(8, 2),
                    head=nn.Linear(6, 4)), IMAGE, set(),
    ),
    "functions of their own": (
        lambda: chain(lambda m, x: Square.apply(m.b(scripted(m.a(x)))), a=conv(8, 8), b=conv(8, 8)),
        IMAGE, set(),
    ),
    "two images": (
        lambda: Net(correlated, stem=conv(3, 8), flow=conv(8, 2), mix=conv(9, 8),
                    head=nn.Linear(8, 4)),
        # The two directions of the flow, and the one channel of what is read where it points.
        IMAGE * 2, {"grid_sampler_2d", "no other unit being like it"},
    ),
    "video": (
        lambda: Net(lambda m, x: head(m, m.b(m.a(x).relu()) + m.c(m.a(x))),
                    a=nn.Conv3d(3, 8, (3, 1, 1)), b=nn.Conv3d(8, 6, (1, 3, 3)),
                    c=nn.Conv3d(8, 6, (1, 3, 3), groups=2), head=nn.Linear(6, 4)),
        ((3, 5, 6, 6),), set(),
    ),
    "sound": (
        lambda: nn.Sequential(nn.Conv1d(1, 8, 9, 4), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
                              nn.ConvTranspose1d(8, 6, 4, 2), nn.GELU(), nn.Conv1d(6, 8, 3),
                              nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(16, 4)),
        ((1, 80),), set(),
    ),
    "sound, normalised": (
        lambda: Net(encoder, stem=wave(1, 8, 5), group=nn.GroupNorm(8, 8), a=wave(8, 6, 3),
                    layer=nn.LayerNorm(6), project=nn.Linear(6, 8), head=nn.Linear(8, 4),
                    position=parametrizations.weight_norm(wave(8, 8, 4, groups=2), dim=2)),
        ((1, 40),), set(),
    ),
}  # fmt: skip


def blurred() -> nn.Module:
    net = chain(lambda m, x: m.b(F.conv2d(m.a(x), m.blur, stride=2, groups=8)), a=conv(8, 8),
                b=conv(8, 8))  # fmt: skip
    kernel = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0]))
    net.register_buffer("blur", kernel.repeat(8, 1, 1, 1) / 16, persistent=False)
    return net


def randomised(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic numbers of its own."""
    kept = {id(buffer) for name, buffer in model.named_buffers() if name not in model.state_dict()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and id(tensor) not in kept:
                positive = tensor.ndim < 2 or tensor.numel() == max(tensor.shape)
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor)
                )
    return model


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_covered(name: str) -> None:
    build, shapes, expected = STRUCTURES[name]
    torch.manual_seed(0)
    model = randomised(build().double()).eval()
    inputs = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    spec = permutation_spec(model, tuple(x[:1] for x in inputs))
    assert {fixed.reason for fixed in spec.fixed} - ENDS == expected, str(spec)
    planted = random_permutation(spec, 1)
    permuted = apply_permutation(model, spec, planted)
    for a, b in zip(outputs(model, inputs), outputs(permuted, inputs), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-12
    assert any(
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), permuted.parameters(), strict=True)
    )
    undone = apply_permutation(permuted, spec, inverse(spec, planted))
    for back in (undone, align(permuted, model, spec=spec).model):
        for key, tensor in model.state_dict().items():
            assert torch.equal(back.state_dict()[key], tensor), key


def outputs(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        result = model(*inputs)
    if isinstance(result, Output):
        return [result.logits, *result.features]
    return [result]


def test_a_part_of_a_network_whose_rest_depends_on_values() -> None:
    """A detector: features and heads count, what happens to boxes in between does not."""

    def whole(m: Net, x: Tensor) -> Tensor:
        x = m.a(m.stem(x).relu()).relu()
        boxes = m.boxes(x).flatten(2).transpose(1, 2)
        best = boxes[boxes[..., 0] > 0]  # as many as there are
        crops = roi_align(x, [best[:, :4]], 3)
        return m.head(m.b(crops).mean((2, 3)))

    def heads(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = m.a(m.stem(x).relu()).relu()
        crops = roi_align(x, [x.new_tensor([[1.0, 2.0, 9.0, 12.0]])] * len(x), 3)
        return m.boxes(x), m.head(m.b(crops).mean((2, 3)))

    torch.manual_seed(0)
    net = Net(whole, stem=conv(3, 8), a=conv(8, 6), boxes=conv(6, 4), b=conv(6, 8),
              head=nn.Linear(8, 4))  # fmt: skip
    model = randomised(net.double()).eval()
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot be traced|does not fit"):
        permutation_spec(model, x)
    spec = permutation_spec(model, x, forward=heads)
    assert set(spec.by_name) == {"stem", "a", "b"}
    permuted = apply_permutation(model, spec, random_permutation(spec, 1))
    with torch.no_grad():
        torch.testing.assert_close(permuted(x), model(x), rtol=1e-12, atol=1e-12)
