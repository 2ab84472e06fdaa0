"""Pieces as matrices, shares, seeds; a rule of one's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fusion.errors import UserError
from fusion.merging.rule import Piece, Rule, mean_of_experts, merge_tensor
from fusion.models import Layer

LAYERS = {
    "linear": (nn.Linear(6, 4), "linear", 1),
    "conv": (nn.Conv2d(6, 4, (2, 3)), "conv", 1),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), "conv", 2),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), "conv", 6),
    "conv1d": (nn.Conv1d(6, 4, 3), "conv", 1),
    "transposed": (nn.ConvTranspose2d(6, 4, (2, 3)), "conv_transpose", 1),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 2, groups=2), "conv_transpose", 2),
}
MATRIX_SHAPES = {
    "linear": (1, 4, 6),
    "conv": (1, 4, 36),
    "grouped": (2, 2, 27),
    "depthwise": (6, 1, 9),
    "conv1d": (1, 4, 18),
    "transposed": (1, 4, 36),
    "transposed grouped": (2, 2, 12),
}
layers = pytest.mark.parametrize("name", LAYERS)


def piece_of(name: str, **changes) -> Piece:
    module, kind, groups = LAYERS[name]
    weight = module.weight.detach()
    layer = Layer("layer", "layer.weight", ("layer.weight", "layer.bias"), groups, kind, ())
    experts = torch.stack([weight, 2 * weight, 3 * weight])
    piece = Piece("layer.weight", layer, 0.0, weight, experts, ("a", "b", "c"), (0.5, 0.3, 0.2))
    return replace(piece, **changes)


@layers
def test_matrices_can_be_put_together_again(name) -> None:
    piece = piece_of(name)
    matrices = piece.matrices(piece.experts)
    assert matrices.shape == (3, *MATRIX_SHAPES[name])
    assert torch.equal(piece.from_matrices(matrices), piece.experts)
    assert torch.equal(piece.from_matrices(piece.matrices(piece.base)), piece.base)
    assert piece.is_matrix == (name != "depthwise")
    assert not replace(piece, key="layer.bias").is_matrix


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise"])
def test_the_matrices_of_a_convolution_act_on_its_patches(name) -> None:
    module, _, groups = LAYERS[name]
    images = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(images, module.kernel_size).unflatten(1, (groups, -1))
    piece = piece_of(name)
    outputs = (piece.matrices(piece.base) @ patches).flatten(1, 2)
    expected = F.conv2d(images, piece.base, groups=groups).flatten(2)
    assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transposed", "transposed grouped"])
def test_the_matrices_of_a_transposed_convolution_act_on_its_inputs(name) -> None:
    """At one pixel: every output unit has a row, every kernel position of an input a column."""
    _module, _, groups = LAYERS[name]
    pixel = torch.randn(1, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    piece = piece_of(name)
    rows = piece.matrices(piece.base).unflatten(-1, (6 // groups, -1))
    outputs = torch.einsum("goik,gi->gok", rows, pixel.view(groups, -1)).flatten(0, 1)
    expected = F.conv_transpose2d(pixel, piece.base, groups=groups).flatten(2)[0]
    assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_summed_changes_have_the_size_of_a_sum() -> None:
    piece = piece_of("linear")
    assert_close(piece.summed_changes, 3 * (0.3 * 1 + 0.2 * 2) * piece.base)
    assert_close(mean_of_experts(piece), (0.5 + 0.3 * 2 + 0.2 * 3) * piece.base)
    assert_close(piece.relative_shares, torch.tensor([1.5, 0.9, 0.6]))
    assert_close(piece.with_changes(0 * piece.changes).experts[1], piece.base)


def test_seeds_depend_on_seed_key_and_names() -> None:
    piece = piece_of("linear")
    seeds = {
        piece.seed_for("x"),
        piece.seed_for("y"),
        replace(piece, seed=1).seed_for("x"),
        replace(piece, key="other").seed_for("x"),
    }
    assert len(seeds) == 4
    assert piece.seed_for("x") == replace(piece, start=7).seed_for("x")


@dataclass(frozen=True, kw_only=True)
class Median(Rule):
    """What an outsider writes."""

    elementwise = True

    def merge(self, piece: Piece) -> Tensor:
        return piece.experts.median(0).values


def test_a_rule_of_ones_own_takes_a_method() -> None:
    rule = Median()
    assert (rule.needs, rule.statistics, rule.affine) == (frozenset(), frozenset(), False)
    experts = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 4.0]), torch.tensor([9.0, 0.0])]
    assert merge_tensor(rule, experts).tolist() == [2.0, 4.0]
    weight, bias = rule.merge_affine(piece_of("linear"), piece_of("conv"))
    assert (weight.shape, bias.shape) == ((4, 6), (4, 6, 2, 3))


def test_only_tensors_of_one_shape_are_merged() -> None:
    with pytest.raises(UserError, match="shape"):
        merge_tensor(Median(), [torch.zeros(2), torch.zeros(3)])
    with pytest.raises(UserError, match="shape"):
        merge_tensor(Median(), [torch.zeros(2)], torch.zeros(3))
