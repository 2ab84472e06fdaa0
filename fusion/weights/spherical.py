"""Merge along great circles: SLERP, and the spherical mean of any number of tensors.

A tensor is taken as one flat vector: its direction is a point on the unit sphere, its norm a
length. Directions are averaged on the sphere, norms on the line. The result is a linear combination
of the operands, so both functions compute its few coefficients from the matrix of inner products
and then read the tensors once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.weights.gram import gram_matrix
from fusion.weights.linear import lerp, weighted_mean
from fusion.weights.operands import normalised_weights, working_operands

# Radians. Below this angle slerp and lerp differ by less than the angle times the difference of the
# norms: the rounding of float32, while float64 still resolves the angle.
PARALLEL = 1e-6
# Radians. This near to opposite directions the coefficients grow to 1/ANTIPARALLEL, and the
# rounding of float32 with them: the circle is no longer determined.
ANTIPARALLEL = 1e-4
STEP_TOLERANCE = 1e-12  # largest change of a coefficient in the last step of the iterated mean
MAX_STEPS = 1000  # it settles in 3 to 30 steps unless the directions nearly cancel out


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from ``a`` (t = 0) to ``b`` (t = 1): direction on the sphere, norm on the line.

    Shoemake (1985), applied to flattened tensors. Where the great circle through both is not
    defined, or not different from the chord, the result is that of ``lerp``: nearly parallel
    tensors, antiparallel ones (every great circle joins them), and a tensor of zeros (it has no
    direction, and the line from it keeps the direction of the other).

    Args:
        a: floating-point tensor of any shape.
        b: floating-point tensor of the same shape.
        t: position on the arc; outside of [0, 1] it continues along the same circle.

    Returns:
        A new tensor, computed in float32 or better, in the dtype of ``a``.

    Raises:
        UserError: the shapes differ, or a tensor is not floating-point.

    Example::

        >>> import torch
        >>> from fusion.weights import slerp
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), 0.5)  # norm 2 at 45 degrees
        tensor([1.4142, 1.4142])
    """
    start, end = working_operands([a, b])
    t = float(t)
    gram = gram_matrix([start, end])
    norm_a, norm_b = (math.sqrt(gram[i, i].item()) for i in (0, 1))
    if norm_a == 0 or norm_b == 0:
        return lerp(a, b, t)
    angle = math.acos(_clamp(gram[0, 1].item() / norm_a / norm_b))
    if not PARALLEL <= angle <= math.pi - ANTIPARALLEL:
        return lerp(a, b, t)
    norm = (1 - t) * norm_a + t * norm_b
    from_a = math.sin((1 - t) * angle) / math.sin(angle) * norm / norm_a
    from_b = math.sin(t * angle) / math.sin(angle) * norm / norm_b
    return (from_a * start + from_b * end).to(a.dtype)


def spherical_mean(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the mean of ``tensors``: of the directions on the sphere, of the norms on the line.

    The direction is the weighted Karcher mean (the point with the least weighted sum of squared
    arcs to the directions of the tensors), found by the usual iteration of Riemannian centres of
    mass (Buss and Fillmore, 2001). For two tensors it is ``slerp(a, b, w_b / (w_a + w_b))``, and
    the mean of n copies of a tensor is that tensor. A tensor of zeros has no direction: it takes
    part in the mean of the norms only. If all tensors are nearly parallel, or the directions
    cancel out so that no mean is defined (two antiparallel tensors), the result is that of
    ``weighted_mean``.

    Args:
        tensors: floating-point tensors of one shape.
        weights: one finite, non-negative number for each tensor; only their ratios count.

    Returns:
        A new tensor, computed in float32 or better, in the dtype of the first one.

    Raises:
        UserError: shapes, dtypes or weights that cannot be averaged.

    Example::

        >>> import torch
        >>> from fusion.weights import spherical_mean
        >>> spherical_mean(list(torch.eye(3)))  # of norm 1, as they are
        tensor([0.5774, 0.5774, 0.5774])
    """
    operands = working_operands(tensors)
    shares = normalised_weights(weights, len(operands))
    if len(operands) == 2:
        return slerp(tensors[0], tensors[1], shares[1])
    gram = gram_matrix(operands).cpu()
    norms = gram.diagonal().sqrt()
    pointed = [i for i, share in enumerate(shares) if share > 0 and norms[i] > 0]
    if len(pointed) < 2:
        return weighted_mean(tensors, weights)
    lengths = norms[pointed]
    cosines = (gram[pointed][:, pointed] / torch.outer(lengths, lengths)).clamp(-1, 1)
    share = torch.tensor([shares[i] for i in pointed], dtype=torch.float64)
    direction = None
    if not bool((cosines.acos() < PARALLEL).all()):
        direction = _karcher_mean(cosines, share / share.sum())
    if direction is None:
        return weighted_mean(tensors, weights)
    norm = float(share @ lengths)  # the share of the zeros counts: they shorten the mean
    merged = torch.zeros_like(operands[0])
    for i, coefficient in zip(pointed, (direction * norm / lengths).tolist(), strict=True):
        merged.add_(operands[i], alpha=coefficient)
    return merged.to(tensors[0].dtype)


def _karcher_mean(cosines: Tensor, weights: Tensor) -> Tensor | None:
    """Return the mean direction in coordinates of the directions, ``None`` if there is none.

    Args:
        cosines: (n, n) inner products of n unit vectors, float64.
        weights: (n,) shares that sum to 1.
    """
    mean = weights.clone()
    for _ in range(MAX_STEPS):
        length = float((mean @ cosines @ mean).clamp(min=0).sqrt())
        if not length > ANTIPARALLEL:
            return None
        mean = mean / length
        along = (cosines @ mean).clamp(-1, 1)
        angles = along.acos()
        if bool((angles > math.pi - ANTIPARALLEL).any()):
            return None
        # The logarithm of each direction at the mean, angle / sin(angle) * (u - cos(angle) * mean),
        # averaged: the step that the mean takes along the sphere.
        stretch = weights / torch.sinc(angles / math.pi)
        step = stretch - (stretch @ along) * mean
        arc = (step @ cosines @ step).clamp(min=0).sqrt()
        moved = arc.cos() * mean + torch.sinc(arc / math.pi) * step
        settled = bool((moved - mean).abs().max() < STEP_TOLERANCE)
        mean = moved
        if settled:
            return mean
    return None


def _clamp(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))
