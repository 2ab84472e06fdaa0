"""Spherical interpolation and the spherical mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from fusion.weights import lerp, slerp, spherical_mean, weighted_mean


def direction(tensor):
    return tensor.flatten().double() / tensor.flatten().double().norm()


def angle(a, b):
    return 2 * torch.asin((direction(a) - direction(b)).norm() / 2)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_moves_evenly_along_the_arc_and_the_norm_along_the_line(t, make):
    a, b = make(0), 3 * make(1)
    merged = slerp(a, b, t)
    whole = angle(a, b)
    assert_close(angle(a, merged), t * whole, atol=1e-6, rtol=0)
    assert_close(angle(merged, b), (1 - t) * whole, atol=1e-6, rtol=0)
    assert_close(merged.norm(), (1 - t) * a.norm() + t * b.norm())


def test_slerp_by_hand():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    third = math.pi / 6
    expected = (2 * 2 / 3 + 4 / 3) * torch.tensor([math.cos(third), math.sin(third)])
    assert_close(slerp(a, b, 1 / 3), expected)


def test_slerp_is_steady_where_it_turns_into_lerp(make):
    a, across = make(0, 500, dtype=torch.float64), make(1, 500, dtype=torch.float64)
    across = across - (across @ a) / (a @ a) * a
    across = across / across.norm() * a.norm()
    for nearly in (0.99e-6, 1.01e-6):
        b = 2 * (math.cos(nearly) * a + math.sin(nearly) * across)
        assert_close(slerp(a, b, 0.4), lerp(a, b, 0.4), rtol=1e-6, atol=1e-6)


def test_antiparallel_tensors_and_zeros_are_interpolated_linearly(make):
    a = make(0)
    zero = torch.zeros_like(a)
    assert torch.equal(slerp(a, -2 * a, 0.25), lerp(a, -2 * a, 0.25))
    assert_close(slerp(zero, a, 0.25), 0.25 * a)
    assert_close(slerp(a, zero, 0.25), 0.75 * a)


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [1, 0], [0, 1]])
def test_the_mean_of_two_is_slerp(weights, make):
    a, b = make(0), 3 * make(1)
    mean = spherical_mean([a, b], weights)
    assert_close(mean, slerp(a, b, weights[1] / sum(weights)))
    # The general iteration finds the same point: a third tensor of weight 0 leads through it.
    assert_close(spherical_mean([a, b, make(2)], [*weights, 0]), mean)


def test_the_mean_has_the_least_sum_of_squared_arcs(make):
    tensors = [make(seed, 40, dtype=torch.float64) + 0.5 for seed in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    mean = spherical_mean(tensors, weights)

    def spread(point):
        return sum(w * angle(point, t) ** 2 for w, t in zip(weights, tensors, strict=True))

    least = spread(mean)
    for seed in range(20):
        assert spread(mean + 1e-3 * make(10 + seed, 40, dtype=torch.float64)) > least
    norms = torch.tensor([float(t.norm()) for t in tensors], dtype=torch.float64)
    assert_close(mean.norm(), norms @ torch.tensor(weights, dtype=torch.float64))


def test_the_mean_does_not_depend_on_the_order(make):
    tensors = [make(seed) for seed in range(4)]
    mean = spherical_mean(tensors, [1, 2, 3, 4])
    assert_close(spherical_mean(tensors[::-1], [4, 3, 2, 1]), mean)


def test_linearly_dependent_directions_have_a_mean():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    third = torch.tensor([1.0, 1.0]) / math.sqrt(2)
    assert_close(spherical_mean([a, b, third, third]), third)


def test_a_zero_among_the_tensors_only_shortens_the_mean(make):
    a, b = make(0), make(1)
    with_zero = spherical_mean([a, b, torch.zeros_like(a)])
    assert_close(with_zero, spherical_mean([a, b]) * 2 / 3)


def test_directions_that_cancel_out_are_averaged_linearly(make):
    a, b = make(0), make(1)
    cancelling = [a, -a, b, -b]
    assert_close(spherical_mean(cancelling), weighted_mean(cancelling))
    assert_close(spherical_mean([a, -2 * a]), -a / 2)
