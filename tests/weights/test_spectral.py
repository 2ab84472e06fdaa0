"""Singular vectors and polar factors against torch's singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fusion.weights.spectral import BLOCK, leading_components, polar

SHAPES = [(6, 20), (20, 6), (8, 8), (BLOCK + 10, 2 * BLOCK), (2 * BLOCK, BLOCK + 10)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def trained(make, *shape: int) -> torch.Tensor:
    """Noise and a strong direction, as a task vector has them; (2, 3, *shape)."""
    strong = make(1, 2, 3, shape[0], 1) @ make(2, 2, 3, 1, shape[1])
    return make(0, 2, 3, *shape) + 10 * strong


@shapes
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_leading_components_are_those_of_the_svd(shape, share, make) -> None:
    matrices = trained(make, *shape)
    count = max(1, int(share * min(shape)))
    left, values, right = leading_components(matrices, count)
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    assert_close(values, s[..., :count], rtol=1e-8, atol=1e-8)
    expected = (u[..., :count] * s[..., None, :count]) @ v[..., :count, :]
    assert_close((left * values[..., None, :]) @ right.mT, expected, rtol=1e-6, atol=1e-6)
    for side in (left, right):
        assert_close(side.mT @ side, torch.eye(count).double().expand(2, 3, -1, -1))


@shapes
def test_the_polar_factor_is_that_of_the_svd(shape, make) -> None:
    matrices = trained(make, *shape)
    factor, values = polar(matrices)
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    assert_close(factor, u @ v, rtol=1e-6, atol=1e-6)
    assert_close(values, s, rtol=1e-8, atol=1e-8)


@shapes
def test_directions_that_are_not_there_are_left_out(shape, make) -> None:
    rank = 3
    matrices = make(0, 1, shape[0], rank) @ make(1, 1, rank, shape[1])
    factor, _ = polar(matrices)
    assert_close(
        torch.linalg.svdvals(factor)[0], torch.tensor([1.0] * 3 + [0.0] * (min(shape) - 3)).double()
    )
    left, values, right = leading_components(matrices, 5)
    assert (values[..., :rank] > 0).all()
    for rest in (values[..., rank:], left[..., rank:], right[..., rank:]):
        assert not rest.any()


def test_zeros_have_no_directions() -> None:
    factor, values = polar(torch.zeros(2, 4, 5))
    assert not factor.any()
    assert not values.any()
    assert all(not part.any() for part in leading_components(torch.zeros(4, 5), 2))
    assert [part.shape[-1] for part in leading_components(torch.ones(4, 5), 0)] == [0, 0, 0]


def test_rounding_beside_large_operands_is_no_direction(make) -> None:
    remainder = 1e-8 * make(0, 1, 4, 6)
    _, values, _ = leading_components(remainder, 2, beside=torch.tensor([1.0]).double())
    assert not values.any()
    assert leading_components(remainder, 2)[1].all()


def test_blocks_of_rows_make_up_the_products_of_all(make, monkeypatch) -> None:
    matrices = trained(make, 2 * BLOCK + 4, 2 * BLOCK + 30)
    results = [leading_components(side, 9) for side in (matrices, matrices.mT.contiguous())]
    monkeypatch.setattr("fusion.weights.spectral.BLOCK", 10**6)
    plain = leading_components(matrices, 9)
    for left, values, right in (results[0], results[1][::-1]):
        assert_close(values, plain[1])
        product = (left * values[..., None, :]) @ right.mT
        assert_close(product, (plain[0] * plain[1][..., None, :]) @ plain[2].mT)


@shapes
def test_components_without_some_directions_are_those_of_the_rest(shape, make) -> None:
    matrices = trained(make, *shape)
    norms = torch.linalg.matrix_norm(matrices).double()
    first = leading_components(matrices, 3)[0]
    rest = matrices.double() - first @ (first.mT @ matrices.double())
    u, s, v = leading_components(rest, 2, beside=norms)
    left, values, right = leading_components(matrices, 2, beside=norms, without=first)
    assert_close(values, s)
    assert_close((left * values[..., None, :]) @ right.mT, (u * s[..., None, :]) @ v.mT)
    assert (first.mT @ left).abs().max() < 1e-12
    everything = torch.linalg.qr(matrices.double())[0]
    for part in leading_components(matrices, 2, beside=norms, without=everything):
        assert not part.any()
