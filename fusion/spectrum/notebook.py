"""Spectrum's signal-to-noise ratio as usually implemented, reproduced exactly for comparison.

It is not calibrated. The threshold lacks the factor √(long side) by which the singular values of
noise grow, so that for a 3×3 convolution with equal channels *all* of pure noise counts as signal;
dividing by the largest singular value makes the score grow when a layer shrinks; every
one-dimensional tensor scores exactly 1. Use :func:`fusion.spectrum.layer_snr` for anything else.
"""

from __future__ import annotations

import math

from torch import Tensor

from fusion.spectrum.svd import singular_values, to_float64

NORMAL_IQR = 1.349  # the interquartile range of a normal distribution of unit variance


def notebook_score(tensor: Tensor) -> float:
    """Return (Σ s[s > τ] / Σ s[s ≤ τ]) / max s for the singular values s of ``tensor``.

    A tensor of shape (out, …) is flattened to (out, rest), one of a single dimension n to (1, n).
    τ = IQR(s)/1.349 · (1 + √β) with β = short side / long side. Where no singular value is noise
    the denominator is 1; where none is signal the score is 0.

    Example::

        >>> import torch
        >>> from fusion.spectrum import notebook_score
        >>> weight = torch.diag(torch.tensor([8.0, 1.0, 0.5]))
        >>> notebook_score(weight) > notebook_score(10 * weight)  # it depends on the unit
        True
    """
    matrix = to_float64(tensor)
    matrix = matrix.reshape(1, -1) if matrix.ndim < 2 else matrix.flatten(1)
    values = singular_values(matrix)
    above = values > notebook_threshold(
        notebook_sigma(values), min(matrix.shape), max(matrix.shape)
    )
    signal, noise = float(values[above].sum()), float(values[~above].sum())
    if signal == 0:
        return 0.0
    return signal / (noise if noise > 0 else 1.0) / float(values[0])


def notebook_sigma(values: Tensor) -> float:
    """Return the spread of the singular ``values`` as if they, not the weights, were normal."""
    return float(values.quantile(0.75) - values.quantile(0.25)) / NORMAL_IQR


def notebook_threshold(sigma: float, a: int, b: int) -> float:
    """Return σ(1 + √(a/b)) for short side ``a`` and long side ``b``; the factor √b is missing."""
    return sigma * (1 + math.sqrt(a / b))
