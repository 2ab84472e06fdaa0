"""The ridge regression of several linear maps."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from fusion.weights.regression import regression_mean


def loss(merged, towards, terms, ridge):
    total = sum(
        weight * ((merged - matrix) @ gram @ (merged - matrix).mT).diagonal(dim1=-2, dim2=-1).sum()
        for matrix, gram, weight in terms
    )
    level = sum(w * g for _, g, w in terms).diagonal(dim1=-2, dim2=-1).mean(-1)
    return total + (ridge * level[:, None, None] * (merged - towards).square()).sum()


def test_it_is_the_minimum_of_its_loss(make) -> None:
    inputs = [make(seed, 2, 30, 7, dtype=torch.float64) for seed in range(3)]
    terms = [
        (make(10 + seed, 2, 4, 7, dtype=torch.float64), x.mT @ x, 0.2 + 0.3 * seed)
        for seed, x in enumerate(inputs)
    ]
    towards = make(20, 2, 4, 7, dtype=torch.float64).requires_grad_(False)
    merged = regression_mean(towards, iter(terms), ridge=0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(merged, towards, terms, 0.1), merged)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_without_inputs_it_stays_where_it_is(make) -> None:
    towards = make(0, 1, 4, 7)
    terms = [(make(1, 1, 4, 7), torch.zeros(1, 7, 7), 1.0)]
    assert torch.equal(regression_mean(towards, terms, ridge=1e-10), towards.double())


def test_one_map_is_returned_where_its_inputs_reach(make) -> None:
    matrix, x = make(0, 1, 4, 7), make(1, 1, 30, 7).double()
    merged = regression_mean(make(2, 1, 4, 7), [(matrix, x.mT @ x, 1.0)], ridge=1e-10)
    assert_close(merged, matrix.double(), rtol=1e-6, atol=1e-6)
