"""Laws that every merging kernel keeps."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fusion.errors import UserError
from fusion.weights import lerp, slerp, spherical_mean, ties, weighted_mean

KERNELS = {
    "lerp": lambda base, a, b: lerp(a, b, 0.3),
    "slerp": lambda base, a, b: slerp(a, b, 0.3),
    "weighted_mean": lambda base, a, b: weighted_mean([a, b, a], [1, 2, 3]),
    "spherical_mean": lambda base, a, b: spherical_mean([a, b, base], [1, 2, 3]),
    "ties": lambda base, a, b: ties(base, [a, b], density=0.4),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@kernels
def test_the_result_does_not_depend_on_the_memory_format(kernel, make):
    plain = [make(seed) for seed in range(3)]
    channels_last = [t.to(memory_format=torch.channels_last) for t in plain]
    mixed = [plain[0], channels_last[1], plain[2]]
    assert torch.equal(kernel(*plain), kernel(*channels_last))
    assert torch.equal(kernel(*plain), kernel(*mixed))


@kernels
def test_operands_are_never_changed(kernel, make):
    operands = [make(seed) for seed in range(3)]
    before = [t.clone() for t in operands]
    kernel(*operands)
    for tensor, copy in zip(operands, before, strict=True):
        assert torch.equal(tensor, copy)


@kernels
def test_half_precision_is_computed_in_float32(kernel, make):
    halves = [make(seed).to(torch.bfloat16) for seed in range(3)]
    merged = kernel(*halves)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, kernel(*[t.float() for t in halves]).to(torch.bfloat16))


@kernels
def test_double_precision_stays_double(kernel, make):
    doubles = [make(seed, dtype=torch.float64) for seed in range(3)]
    merged = kernel(*doubles)
    assert merged.dtype == torch.float64
    assert not torch.equal(merged, merged.float().double())


@kernels
def test_copies_merge_to_the_copy(kernel, make):
    tensor = make(0)
    assert torch.equal(kernel(tensor, tensor.clone(), tensor.clone()), tensor)


def test_ties_with_full_density_merges_copies_to_the_copy(make):
    base, expert = make(0), make(1)
    assert_close(ties(base, [expert] * 3, [1, 2, 3], density=1.0), expert)


@kernels
def test_zero_tensors_are_finite(kernel, make):
    zero = torch.zeros(6, 4, 3, 3)
    for operands in ([zero] * 3, [make(0), zero, make(1)], [zero, make(0), make(1)]):
        assert kernel(*operands).isfinite().all()


@kernels
def test_shapes_must_agree(kernel, make):
    with pytest.raises(UserError, match=r"\(6, 4, 3, 3\)"):
        kernel(make(0), make(1), make(2, 6, 4, 3, 1))


@kernels
def test_integers_have_no_mean(kernel, make):
    with pytest.raises(UserError, match="int64"):
        kernel(make(0), make(1), torch.ones(6, 4, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]]
)
def test_weights_must_be_shares(weights, make):
    tensors = [make(seed) for seed in range(3)]
    for merge in (weighted_mean, spherical_mean, lambda t, w: ties(t[0], t, w, density=1.0)):
        with pytest.raises(UserError, match="weights"):
            merge(tensors, weights)


def test_nothing_to_merge_is_an_error(make):
    for merge in (weighted_mean, spherical_mean, lambda t: ties(make(0), t, density=1.0)):
        with pytest.raises(UserError, match="at least one"):
            merge([])


def test_lerp_is_exact_at_both_ends(make):
    a, b = make(0), make(1) * 1e6
    assert torch.equal(lerp(a, b, 0.0), a)
    assert torch.equal(lerp(a, b, 1.0), b)


def test_the_weighted_mean_counts_ratios_only(make):
    tensors = [make(seed) for seed in range(3)]
    expected = (1 * tensors[0] + 2 * tensors[1] + 5 * tensors[2]) / 8
    assert_close(weighted_mean(tensors, [1, 2, 5]), expected)
    assert_close(weighted_mean(tensors, [10, 20, 50]), expected)
