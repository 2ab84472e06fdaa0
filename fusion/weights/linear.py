"""Merge along straight lines: linear interpolation and the weighted mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.weights.operands import normalised_weights, working_operands


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate linearly from ``a`` (t = 0) to ``b`` (t = 1).

    Both ends are exact, and t may lie outside of [0, 1].

    Args:
        a: floating-point tensor of any shape.
        b: floating-point tensor of the same shape.
        t: position on the line.

    Returns:
        A new tensor, computed in float32 or better, in the dtype of ``a``.

    Raises:
        UserError: the shapes differ, or a tensor is not floating-point.

    Example::

        >>> import torch
        >>> from fusion.weights import lerp
        >>> lerp(torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]), 0.25)
        tensor([0.5000, 3.0000])
    """
    start, end = working_operands([a, b])
    return torch.lerp(start, end, float(t)).to(a.dtype)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the mean of ``tensors`` with ``weights`` (equal ones by default).

    The mean of n copies of a tensor is that tensor, bit for bit: it is computed as the first
    tensor plus the weighted mean of the differences from it.

    Args:
        tensors: floating-point tensors of one shape.
        weights: one finite, non-negative number for each tensor; only their ratios count.

    Returns:
        A new tensor, computed in float32 or better, in the dtype of the first one.

    Raises:
        UserError: shapes, dtypes or weights that cannot be averaged.

    Example::

        >>> import torch
        >>> from fusion.weights import weighted_mean
        >>> weighted_mean([torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])], [3, 1])
        tensor([1., 3.])
    """
    operands = working_operands(tensors)
    shares = normalised_weights(weights, len(operands))
    mean = operands[0].clone()
    for tensor, share in zip(operands[1:], shares[1:], strict=True):
        mean.add_(tensor - operands[0], alpha=share)
    return mean.to(tensors[0].dtype)
