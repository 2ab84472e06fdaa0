from __future__ import annotations

import pytest

from fusion.spectrum import tracy_widom

# Percentiles of the law of order 1 as published: Bejan (2005), Johnstone (2001), table 1
PUBLISHED = {0.50: -1.2686, 0.70: -0.5923, 0.90: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.2724}


@pytest.mark.parametrize(("p", "quantile"), PUBLISHED.items())
def test_quantiles_agree_with_published_percentiles(p, quantile):
    # Bejan's far tail differs from the exact 3.2722 in the last place
    assert tracy_widom.upper_quantile(1 - p) == pytest.approx(quantile, abs=2.5e-4)
    assert tracy_widom.cdf(tracy_widom.upper_quantile(1 - p)) == pytest.approx(p, abs=1e-12)


def test_quantiles_reach_far_into_the_tail():
    levels = [0.5, 1e-2, 1e-4, 1e-6, 1e-8, 1e-12]
    quantiles = [tracy_widom.upper_quantile(level) for level in levels]
    assert quantiles == sorted(quantiles)
    assert quantiles[-1] < 14


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_what_is_no_probability_is_refused(alpha):
    with pytest.raises(ValueError, match=str(alpha)):
        tracy_widom.upper_quantile(alpha)


def test_the_edge_is_symmetric_in_nothing_but_its_sides_and_tends_to_the_bare_edge():
    assert tracy_widom.noise_edge(64, 576, 0.01) == pytest.approx(
        tracy_widom.noise_edge(576, 64, 0.01)
    )
    excess = [
        tracy_widom.noise_edge(n, 9 * n, 0.01) / (n**0.5 + (9 * n) ** 0.5) - 1
        for n in (16, 128, 1024, 8192)
    ]
    assert excess == sorted(excess, reverse=True)
    assert 0 < excess[-1] < 0.005
