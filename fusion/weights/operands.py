"""Checks of the operands of every kernel: one shape, a floating dtype, valid weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from fusion.errors import UserError
from fusion.weights.precision import working_dtype


def working_operands(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Check that ``tensors`` can be merged and return them in the dtype of the arithmetic.

    That dtype is float32, or float64 where a tensor has it; the values and the memory format of
    each tensor stay as they are.

    Raises:
        UserError: no tensor at all, shapes that differ, or a tensor that is not floating-point.
    """
    if not tensors:
        raise UserError("there is nothing to merge: give at least one tensor")
    shape = tensors[0].shape
    for position, tensor in enumerate(tensors):
        if tensor.shape != shape:
            raise UserError(
                f"tensor {position} has the shape {tuple(tensor.shape)}, tensor 0 has "
                f"{tuple(shape)}; only tensors of one shape can be merged"
            )
        if not tensor.is_floating_point():
            raise UserError(
                f"tensor {position} has the dtype {tensor.dtype}, which has no mean; "
                f"merge floating-point tensors and carry the others over"
            )
    dtype = working_dtype(tensors)
    return [tensor.detach().to(dtype) for tensor in tensors]


def normalised_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return ``count`` weights that sum to 1, equal ones for ``None``.

    Raises:
        UserError: not one weight for each tensor, a negative or non-finite one, or all zero.

    Example::

        >>> from fusion.weights import normalised_weights
        >>> normalised_weights([3, 1], 2), normalised_weights(None, 2)
        ([0.75, 0.25], [0.5, 0.5])
    """
    if weights is None:
        return [1 / count] * count
    if not all(isinstance(w, Real) and not isinstance(w, bool) for w in weights):
        raise UserError(f"the weights {list(weights)} are no shares; give numbers")
    values = [float(weight) for weight in weights]
    if len(values) != count:
        raise UserError(f"there are {len(values)} weights for {count} tensors; give one for each")
    total = math.fsum(values)
    if not math.isfinite(total) or min(values) < 0 or total == 0:
        raise UserError(
            f"the weights {values} are no shares; give finite numbers that are not negative "
            f"and not all zero"
        )
    return [value / total for value in values]
