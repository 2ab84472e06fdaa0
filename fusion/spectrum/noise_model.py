"""Noise of a matrix from its singular values: standard deviation and upper edge."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from torch import Tensor

from fusion.options import Within
from fusion.spectrum import marchenko_pastur, tracy_widom
from fusion.spectrum.notebook import notebook_sigma, notebook_threshold

MIN_ALPHA = 1e-9  # beyond it the tail of the Tracy–Widom law runs out of double precision
Level = Annotated[float, Within(least=MIN_ALPHA, below=1)]
SigmaRule = Literal["median", "iqr", "notebook"]
ThresholdRule = Literal["tracy_widom", "mp_edge", "gavish_donoho", "notebook"]


def estimate_sigma(values: Tensor, a: int, b: int, rule: SigmaRule) -> float:
    """Return the standard deviation of the noise in matrices a×b, a ≤ b.

    Args:
        values: their singular values, (n,); those of several blocks together.
        a: short side.
        b: long side.
        rule: ``median``: s_median/√((b−½)μ_β), μ_β the median of the Marchenko–Pastur law (Gavish &
            Donoho 2014). ``iqr``: the same with interquartile ranges. ``notebook``: IQR(s)/1.349.
    """
    if rule == "notebook":
        return notebook_sigma(values)
    # b − ½ as in Johnstone's centring: with b the estimate is too small by 1/(4b) of itself, which
    # alone raises the false alarms of square matrices from 3 % to 4 % at 64×64.
    root_b, beta = math.sqrt(b - 0.5), a / b
    if rule == "median":
        return float(values.quantile(0.5)) / (root_b * math.sqrt(marchenko_pastur.median(beta)))
    spread = float(values.quantile(0.75) - values.quantile(0.25))
    return spread / (root_b * marchenko_pastur.singular_value_iqr(beta))


def noise_threshold(sigma: float, a: int, b: int, rule: ThresholdRule, *, alpha: float) -> float:
    """Return the threshold on singular values above which a matrix a×b, a ≤ b, has signal.

    Args:
        sigma: standard deviation of the noise.
        a: short side.
        b: long side.
        rule: ``tracy_widom``: the value that the largest singular value of noise exceeds with
            probability ``alpha`` (Johnstone 2001). ``mp_edge``: σ(√a+√b), its limit for large
            matrices. ``gavish_donoho``: the optimal hard threshold. ``notebook``: σ(1+√β).
        alpha: level of ``tracy_widom``; the other rules have none.
    """
    if rule == "tracy_widom":
        return sigma * tracy_widom.noise_edge(a, b, alpha)
    if rule == "mp_edge":
        return sigma * (math.sqrt(a) + math.sqrt(b))
    if rule == "gavish_donoho":
        return sigma * math.sqrt(b) * optimal_hard_threshold(a / b)
    return notebook_threshold(sigma, a, b)


def optimal_hard_threshold(beta: float) -> float:
    """Return λ*(β), the optimal threshold in units of σ√b (Gavish & Donoho 2014)."""
    root = math.sqrt(beta**2 + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
