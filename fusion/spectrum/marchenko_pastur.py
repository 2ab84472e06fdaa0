"""The Marchenko–Pastur law of the singular values of pure noise.

Let X be a×b with a ≤ b and independent entries of mean 0 and standard deviation 1. As the sides
grow with β = a/b fixed, the eigenvalues λ of X Xᵀ/b fill the interval [(1−√β)², (1+√β)²] with
density √((λ₊−λ)(λ−λ₋)) / (2πβλ) (Marchenko & Pastur, 1967). The singular values of X are √(bλ).

With λ = 1 + β + 2√β·cos θ the law has an elementary distribution function, used here: no numerical
integration, and no loss of accuracy at the hard edge that appears as β → 1.
"""

from __future__ import annotations

import functools
import math

from scipy.optimize import brentq


def support(beta: float) -> tuple[float, float]:
    """Return the least and the greatest eigenvalue of the law with aspect ratio ``beta`` ≤ 1."""
    _check_beta(beta)
    root = math.sqrt(beta)
    return (1 - root) ** 2, (1 + root) ** 2


def density(eigenvalue: float, beta: float) -> float:
    """Return the density of the law at ``eigenvalue``; 0 outside the support."""
    low, high = support(beta)
    if not low < eigenvalue < high:
        return 0.0
    return math.sqrt((high - eigenvalue) * (eigenvalue - low)) / (2 * math.pi * beta * eigenvalue)


def cdf(eigenvalue: float, beta: float) -> float:
    """Return the share of eigenvalues that are at most ``eigenvalue``."""
    low, high = support(beta)
    if eigenvalue <= low:
        return 0.0
    if eigenvalue >= high:
        return 1.0
    cosine = (eigenvalue - 1 - beta) / (2 * math.sqrt(beta))
    return 1 - _share_above(math.acos(min(1.0, max(-1.0, cosine))), beta)


@functools.lru_cache(maxsize=1024)
def quantile(p: float, beta: float) -> float:
    """Return the eigenvalue below which a share ``p`` of the eigenvalues lies."""
    low, high = support(beta)
    if not 0 <= p <= 1:
        raise ValueError(f"a quantile needs a share p from 0 to 1, got {p}")
    if p == 0:
        return low
    if p == 1:
        return high
    theta = brentq(lambda angle: _share_above(angle, beta) - (1 - p), 0.0, math.pi, xtol=1e-14)
    return 1 + beta + 2 * math.sqrt(beta) * math.cos(theta)


def median(beta: float) -> float:
    """Return the median eigenvalue, the μ_β of Gavish & Donoho (2014)."""
    return quantile(0.5, beta)


def singular_value_iqr(beta: float) -> float:
    """Return the interquartile range of the singular values of X/√b."""
    return math.sqrt(quantile(0.75, beta)) - math.sqrt(quantile(0.25, beta))


def _share_above(theta: float, beta: float) -> float:
    """Return the share of eigenvalues above 1 + β + 2√β·cos θ, for θ from 0 (none) to π (all).

    In θ the density is 2 sin²θ / (π·(1 + β + 2√β·cos θ)), whose antiderivative is elementary.
    """
    root = math.sqrt(beta)
    # sin/cos instead of tan: the angle π, where the tangent has its pole, is the lower edge
    angle = math.atan2((1 - root) * math.sin(theta / 2), (1 + root) * math.cos(theta / 2))
    return (
        (1 + beta) * theta / (2 * beta) - math.sin(theta) / root - (1 - beta) * angle / beta
    ) / math.pi


def _check_beta(beta: float) -> None:
    if not 0 < beta <= 1:
        raise ValueError(
            f"the aspect ratio beta = short side / long side lies in (0, 1], got {beta}"
        )
