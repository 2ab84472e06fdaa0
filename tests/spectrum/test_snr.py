from __future__ import annotations

import math

import pytest
import torch

from fusion.errors import UserError
from fusion.spectrum import as_matrix, layer_snr
from fusion.spectrum.marchenko_pastur import median
from fusion.spectrum.noise_model import optimal_hard_threshold
from fusion.spectrum.snr import MIN_RESOLUTION

SHAPES = [(16, 144), (64, 64), (64, 576), (128, 1152), (512, 4608)]
RULES = ["tracy_widom", "mp_edge", "gavish_donoho", "notebook"]
FALSE_ALARMS = 0.04  # the most that a level of 0.01 may become through the estimate of sigma


def same(a, b, rel=1e-9):
    return (
        a.signal_rank == b.signal_rank
        and a.snr == pytest.approx(b.snr, rel=rel)
        and a.threshold == pytest.approx(b.threshold, rel=rel)
    )


# --- the law of noise ---------------------------------------------------------------------------


def false_alarms(noise, shape, draws):
    results = [layer_snr(noise(*shape)) for _ in range(draws)]
    assert all((result.signal_rank == 0) == (result.snr == 0) for result in results)
    return sum(result.signal_rank > 0 for result in results)


@pytest.mark.parametrize(
    ("shape", "draws"), [((16, 144), 2000), ((64, 64), 1000), ((64, 576), 500), ((128, 1152), 100)]
)
def test_pure_noise_has_no_signal(noise, shape, draws):
    assert false_alarms(noise, shape, draws) <= FALSE_ALARMS * draws


def test_pure_noise_of_a_large_layer_has_no_signal(noise):
    assert false_alarms(noise, (512, 4608), draws=4) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "draws"), list(zip(SHAPES, [20000, 5000, 5000, 2000, 300], strict=True))
)
def test_pure_noise_has_no_signal_in_many_draws(noise, shape, draws):
    assert false_alarms(noise, shape, draws) <= FALSE_ALARMS * draws


def test_a_larger_level_raises_more_alarms(noise):
    weights = [noise(24, 100) for _ in range(300)]
    alarms = [
        sum(layer_snr(weight, alpha=alpha).signal_rank > 0 for weight in weights)
        for alpha in (1e-4, 0.01, 0.2)
    ]
    assert alarms[0] <= alarms[1] < alarms[2] < 0.3 * len(weights)


def test_the_bare_edge_is_less_careful_and_the_notebook_is_blind(noise):
    weights = [noise(64, 576) for _ in range(100)]
    bare = sum(layer_snr(weight, threshold="mp_edge").signal_rank > 0 for weight in weights)
    careful = sum(layer_snr(weight).signal_rank > 0 for weight in weights)
    assert careful <= 4 < 10 < bare
    blind = layer_snr(weights[0], sigma="notebook", threshold="notebook")
    assert blind.signal_rank == 64


@pytest.mark.parametrize("rule", ["median", "iqr"])
def test_sigma_is_that_of_the_noise(noise, rule):
    assert layer_snr(0.02 * noise(256, 1024), sigma=rule).sigma == pytest.approx(0.02, rel=0.02)


# --- signal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["tracy_widom", "gavish_donoho"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_signal_of_rank_four_is_found_exactly(with_signal, shape, threshold):
    draws = 2 if shape == (512, 4608) else 10
    ranks = {
        layer_snr(with_signal(*shape, rank=4), threshold=threshold).signal_rank
        for _ in range(draws)
    }
    assert ranks == {4}


def test_more_signal_scores_higher(with_signal):
    scores = [layer_snr(with_signal(64, 576, rank=rank)).snr for rank in (0, 1, 4, 16)]
    assert scores[0] == 0
    assert scores == sorted(set(scores))


def test_the_score_is_the_ratio_of_the_two_sums(with_signal):
    result = layer_snr(with_signal(64, 576, rank=4))
    values = result.singular_values
    above = values > result.threshold
    assert result.snr == pytest.approx(float(values[above].sum() / values[~above].sum()))
    assert torch.equal(values, values.sort(descending=True).values)
    assert values.dtype == torch.float64


def test_the_optimal_threshold_is_the_published_one(noise):
    # Gavish & Donoho (2014): 4/√3 for known noise, 2.858 times the median for unknown noise
    assert optimal_hard_threshold(1.0) == pytest.approx(4 / math.sqrt(3))
    for beta in (0.05, 0.3, 0.5, 0.8, 1.0):
        cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43  # theirs, good to 0.02
        assert optimal_hard_threshold(beta) / math.sqrt(median(beta)) == pytest.approx(
            cubic, abs=0.02
        )
    result = layer_snr(noise(200, 200), threshold="gavish_donoho")
    half_median = float(result.singular_values.quantile(0.5))
    assert result.threshold == pytest.approx(2.858 * half_median, rel=0.002)


# --- invariance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", RULES)
@pytest.mark.parametrize("sigma", ["median", "iqr", "notebook"])
def test_scale_transposition_and_order_do_not_matter(with_signal, sigma, threshold):
    weight = with_signal(64, 144, rank=3)
    result = layer_snr(weight, sigma=sigma, threshold=threshold)
    # an uncalibrated sigma below a calibrated edge is too coarse to find anything
    assert (result.signal_rank > 0) == (sigma != "notebook" or threshold == "notebook")
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randperm(n, generator=generator) for n in weight.shape)
    for other, scale in [
        (weight.T, 1),
        (weight[rows][:, columns], 1),
        (-weight, 1),
        (weight * 2.0**-100, 2.0**-100),
        (weight.double() * 1e200, 1e200),
    ]:
        changed = layer_snr(other, sigma=sigma, threshold=threshold)
        assert (changed.signal_rank, changed.snr) == (
            result.signal_rank,
            pytest.approx(result.snr, rel=1e-9),
        )
        assert changed.sigma == pytest.approx(scale * result.sigma, rel=1e-9)
        assert changed.threshold == pytest.approx(scale * result.threshold, rel=1e-9)


def test_memory_format_does_not_matter(with_signal):
    weight = with_signal(32, 16 * 9, rank=2).reshape(32, 16, 3, 3)
    other = weight.to(memory_format=torch.channels_last)
    assert not other.is_contiguous()
    assert same(layer_snr(other), layer_snr(weight), rel=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_hardly_matters(with_signal, dtype):
    weight = with_signal(64, 576, rank=4)
    assert same(layer_snr(weight.to(dtype)), layer_snr(weight), rel=0.01)


def test_the_weight_is_left_alone_and_no_graph_is_kept(with_signal):
    weight = torch.nn.Parameter(with_signal(16, 40, rank=1))
    before = weight.detach().clone()
    assert not layer_snr(weight).singular_values.requires_grad
    assert torch.equal(weight, before)


# --- where the theory ends ----------------------------------------------------------------------


@pytest.mark.parametrize("threshold", RULES)
@pytest.mark.parametrize("sigma", ["median", "iqr", "notebook"])
def test_zeros_have_nothing(sigma, threshold):
    result = layer_snr(torch.zeros(8, 4, 3, 3), sigma=sigma, threshold=threshold)
    assert (result.snr, result.signal_rank, result.sigma, result.threshold) == (0, 0, 0, 0)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_weight_without_noise_scores_high_but_finite(noise, rank, dtype):
    product = noise(20, rank).double() @ noise(rank, 300).double()
    flat = torch.kron(torch.eye(rank).double(), torch.ones(7, 9).double())
    for weight in (product, flat):
        result = layer_snr(weight.to(dtype))
        resolution = max(torch.finfo(dtype).eps, MIN_RESOLUTION)
        assert result.signal_rank == rank
        assert 0.1 / resolution < result.snr < 1000 / resolution
        assert result.sigma > 0


def test_dead_channels_are_left_out(with_signal):
    weight = with_signal(32, 100, rank=2)
    padded = torch.zeros(128, 300)
    padded[::4, ::3] = weight
    assert same(layer_snr(padded), layer_snr(weight))


def test_a_rank_deficient_weight_is_finite(noise):
    weight = noise(64, 576)
    weight[48:] = weight[:16]  # tied filters
    result = layer_snr(weight)
    assert math.isfinite(result.snr)
    assert result.sigma > 0.1
    assert result.signal_rank <= 16


@pytest.mark.parametrize("shape", [(), (7,), (1, 50), (50, 1, 1, 1), (2, 50)])
@pytest.mark.parametrize("sigma", ["median", "iqr", "notebook"])
def test_too_few_singular_values_tell_nothing(noise, shape, sigma):
    result = layer_snr(noise(*shape), sigma=sigma)
    assert (result.snr, result.signal_rank) == (0, 0)


def test_an_empty_weight_has_nothing():
    assert layer_snr(torch.zeros(0, 3)).snr == 0


# --- grouped kernels ----------------------------------------------------------------------------


def test_depthwise_kernels_are_one_matrix(with_signal):
    matrix = with_signal(128, 9, rank=1)
    kernels = matrix.reshape(128, 1, 3, 3)
    result = layer_snr(kernels, groups=128)
    assert result.signal_rank == 1
    assert same(result, layer_snr(matrix))
    # two outputs a channel; a transposed convolution's kernel has the same shape
    assert same(layer_snr(kernels, groups=64), layer_snr(matrix))


def test_pure_noise_in_groups_has_no_signal(noise):
    draws = 200
    alarms = sum(layer_snr(noise(64, 4, 3, 3), groups=16).signal_rank > 0 for _ in range(draws))
    assert alarms <= FALSE_ALARMS * draws
    alarms = sum(layer_snr(noise(64, 1, 3, 3), groups=64).signal_rank > 0 for _ in range(draws))
    assert alarms <= FALSE_ALARMS * draws


def test_signal_ranks_of_groups_add_up(noise, with_signal):
    blocks = [with_signal(16, 72, rank=rank) for rank in (0, 1, 2, 0)]
    weight = torch.cat(blocks).reshape(64, 8, 3, 3)
    result = layer_snr(weight, groups=4)
    assert result.signal_rank == 3
    assert len(result.singular_values) == 64
    reordered = torch.cat([blocks[i] for i in (2, 0, 3, 1)]).reshape(64, 8, 3, 3)
    assert same(layer_snr(reordered, groups=4), result)


def test_groups_of_zeros_are_left_out(noise):
    weight = noise(32, 8, 3, 3)
    padded = torch.cat([weight, torch.zeros_like(weight)])
    assert layer_snr(padded, groups=8).sigma == pytest.approx(layer_snr(weight, groups=4).sigma)


def test_matrices_of_a_weight():
    assert as_matrix(torch.zeros(8, 4, 3, 3)).shape == (1, 8, 36)
    assert as_matrix(torch.zeros(8, 4, 3, 3), groups=2).shape == (2, 4, 36)
    assert as_matrix(torch.zeros(8, 1, 3, 3), groups=8).shape == (1, 8, 9)
    assert as_matrix(torch.zeros(8, 2, 3, 3), groups=8).shape == (1, 8, 18)
    assert as_matrix(torch.zeros(10, 64)).shape == (1, 10, 64)
    assert as_matrix(torch.zeros(6, 4, 5)).shape == (1, 6, 20)
    assert as_matrix(torch.zeros(5)).shape == (1, 1, 5)
    weight = torch.arange(48.0).reshape(4, 3, 2, 2)
    assert torch.equal(as_matrix(weight, groups=2)[1, 0], weight[2].flatten())


# --- a user's mistakes --------------------------------------------------------------------------


def test_mistakes_are_named(noise):
    weight = noise(16, 16)
    with pytest.raises(UserError, match=r"sigma.*did you mean 'median'"):
        layer_snr(weight, sigma="medain")
    with pytest.raises(UserError, match=r"threshold.*did you mean 'tracy_widom'"):
        layer_snr(weight, threshold="tracywidom")
    for alpha in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UserError, match="alpha"):
            layer_snr(weight, alpha=alpha)
    for groups in (0, 3):
        with pytest.raises(UserError, match=f"groups={groups}"):
            layer_snr(weight, groups=groups)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="finite"):
            layer_snr(torch.full((4, 4), bad))
    with pytest.raises(UserError, match="int64"):
        layer_snr(torch.ones(4, 4, dtype=torch.int64))
