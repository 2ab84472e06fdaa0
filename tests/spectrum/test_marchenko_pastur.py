from __future__ import annotations

import pytest
import torch
from scipy.integrate import quad

from fusion.spectrum import marchenko_pastur

BETAS = [1e-3, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("beta", BETAS)
def test_the_distribution_function_is_the_integral_of_the_density(beta):
    low, high = marchenko_pastur.support(beta)
    middle = (low + high) / 2
    integral, _ = quad(marchenko_pastur.density, low, middle, args=(beta,), limit=500)
    assert marchenko_pastur.cdf(middle, beta) == pytest.approx(integral, abs=1e-6)
    assert marchenko_pastur.cdf(low, beta) == 0
    assert marchenko_pastur.cdf(high, beta) == 1
    assert marchenko_pastur.density(high + 1, beta) == 0


@pytest.mark.parametrize("beta", BETAS)
def test_quantiles_undo_the_distribution_function(beta):
    for p in (0.001, 0.25, 0.5, 0.75, 0.999):
        quantile = marchenko_pastur.quantile(p, beta)
        assert marchenko_pastur.cdf(quantile, beta) == pytest.approx(p, abs=1e-10)
    assert (marchenko_pastur.quantile(0, beta), marchenko_pastur.quantile(1, beta)) == (
        marchenko_pastur.support(beta)
    )


def test_the_singular_values_of_a_large_noise_matrix_follow_it(noise):
    a, b = 400, 1600
    values = torch.linalg.svdvals(noise(a, b).double()) / b**0.5
    for p in (0.25, 0.5, 0.75):
        expected = marchenko_pastur.quantile(p, a / b) ** 0.5
        assert float(values.quantile(p)) == pytest.approx(expected, rel=0.005)
    iqr = float(values.quantile(0.75) - values.quantile(0.25))
    assert iqr == pytest.approx(marchenko_pastur.singular_value_iqr(a / b), rel=0.01)


def test_what_is_no_aspect_ratio_or_share_is_refused():
    with pytest.raises(ValueError, match="2"):
        marchenko_pastur.median(2.0)
    with pytest.raises(ValueError, match="0"):
        marchenko_pastur.median(0.0)
    with pytest.raises(ValueError, match=r"1\.5"):
        marchenko_pastur.quantile(1.5, 0.5)
