"""RegMean on real patches: weight and bias together, convolutions of any groups, dead inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fusion.merging.rule import Piece, mean_of_experts, merge_tensor
from fusion.merging.rules import RegMean
from fusion.models import Layer


def patches(images: Tensor, conv: nn.Conv2d) -> Tensor:
    """The inputs of a convolution and a constant, (groups, positions, columns + 1)."""
    columns = F.unfold(images, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    split = columns.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return F.pad(split, (0, 1), value=1.0)


@pytest.fixture(params=[1, 2, 4], ids=lambda groups: f"groups={groups}")
def case(request, train_digits):
    """Three convolutions, each with digits of its own, as the pieces of one layer."""
    groups = request.param
    images = torch.stack([train_digits[index][0] for index in range(300)])
    images = torch.cat([images, images.flip(2), images.flip(3), images.mT], dim=1)  # 4 channels
    images[:, 3] = 0  # a dead channel
    # each expert's data is strong in a channel of its own
    strength = 0.1 + 0.9 * torch.eye(3, 4)[:, :, None, None]
    inputs = [batch * own for batch, own in zip(images.split(100), strength, strict=True)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv2d(4, 8, 3, padding=1, groups=groups) for _ in range(3)]
    grams = []
    for conv, batch in zip(convs, inputs, strict=True):
        x = patches(batch, conv).double()
        grams.append(x.mT @ x / x.shape[1])
    layer = Layer("conv", "conv.weight", ("conv.weight", "conv.bias"), groups, "conv", ())

    def piece(name: str, **statistics: Tensor) -> Piece:
        experts = torch.stack([getattr(conv, name).detach() for conv in convs])
        shares = (1 / 3, 1 / 3, 1 / 3)
        return Piece(f"conv.{name}", layer, 0.5, None, experts, ("a", "b", "c"), shares, statistics)

    return convs, inputs, piece("weight", gram=torch.stack(grams)), piece("bias")


@torch.no_grad()
def output_error(convs, inputs, weight: Tensor, bias: Tensor | None) -> float:
    """The mean squared difference from each expert's outputs on its own images."""
    total = 0.0
    for conv, batch in zip(convs, inputs, strict=True):
        merged = F.conv2d(batch, weight, bias, padding=1, groups=conv.groups)
        total += float((merged - conv(batch)).double().square().mean())
    return total


def test_it_minimises_the_difference_from_the_experts_outputs(case) -> None:
    convs, inputs, weight, bias = case
    merged = RegMean(off_diagonal=1.0).merge_affine(weight, bias)
    averaged_bias = RegMean(off_diagonal=1.0, bias=False).merge_affine(weight, bias)
    mean = mean_of_experts(weight), mean_of_experts(bias)
    best = output_error(convs, inputs, *merged)
    assert best < output_error(convs, inputs, *averaged_bias)
    assert best < 0.5 * output_error(convs, inputs, *mean)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # no step from the minimum leads down
        step = [1e-2 * torch.randn(t.shape, generator=generator) for t in merged]
        assert output_error(convs, inputs, merged[0] + step[0], merged[1] + step[1]) > best


def test_inputs_without_data_are_averaged(case) -> None:
    _, _, weight, bias = case
    merged, _ = RegMean().merge_affine(weight, bias)
    mean = mean_of_experts(weight)
    energy = weight.statistics["gram"].sum(0).diagonal(dim1=1, dim2=2)[:, None, :-1]
    dead = weight.from_matrices(energy.expand_as(weight.matrices(mean)).contiguous()) == 0
    assert 0 < int(dead.sum()) < dead.numel()
    assert_close(merged[dead], mean[dead], rtol=0, atol=0)
    assert not torch.equal(merged, mean)


def test_equal_gram_matrices_give_the_mean(case) -> None:
    _, _, weight, bias = case
    gram = weight.statistics["gram"][:1].expand(3, -1, -1, -1)
    same = replace(weight, shares=(0.5, 0.3, 0.2), statistics={"gram": gram})
    biases = replace(bias, shares=(0.5, 0.3, 0.2))
    merged = RegMean().merge_affine(same, biases)
    assert_close(merged[0], mean_of_experts(same), rtol=1e-4, atol=1e-6)
    assert_close(merged[1], mean_of_experts(biases), rtol=1e-4, atol=1e-6)


def test_without_a_bias_the_weight_is_solved_alone(case) -> None:
    convs, inputs, weight, bias = case
    rule = RegMean(off_diagonal=1.0, bias=False)
    merged, shift = rule.merge_affine(weight, bias)
    assert torch.equal(merged, rule.merge(weight))
    assert torch.equal(shift, mean_of_experts(bias))
    without = [nn.Conv2d(4, 8, 3, padding=1, groups=conv.groups, bias=False) for conv in convs]
    for plain, conv in zip(without, convs, strict=True):
        plain.weight = conv.weight
    assert output_error(without, inputs, merged, None) < 0.5 * output_error(
        without, inputs, mean_of_experts(weight), None
    )


def test_gram_matrices_of_another_shape_are_refused(normal) -> None:
    experts = list(normal(2, 3, 4, of="e"))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\), not \(2, 1, 5, 5\)"):
        merge_tensor(RegMean(), experts, statistics={"gram": torch.ones(2, 1, 4, 4)})


def test_what_the_data_never_reaches_is_averaged(normal) -> None:
    experts = list(normal(2, 3, 4, of="e"))
    assert_close(merge_tensor(RegMean(), experts), (experts[0] + experts[1]) / 2)
    zeros = {"gram": torch.zeros(2, 1, 5, 5)}
    assert_close(merge_tensor(RegMean(), experts, statistics=zeros), (experts[0] + experts[1]) / 2)
