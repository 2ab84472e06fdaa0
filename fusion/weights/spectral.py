"""Singular vectors and polar factors of stacks of matrices, through the smaller side.

A weight of O rows and I·k·k columns has rank min(O, I·k·k) at most, and everything here follows
from the eigenvectors of the Gram matrix of its smaller side, in float64, at a fraction of the cost
of a singular value decomposition in float32. Forming the Gram matrix squares the singular values,
so that those below about 1e-8 of the largest one are lost in float64's rounding; ``NEGLIGIBLE`` is
well above that.
"""

from __future__ import annotations

import torch
from scipy import linalg
from scipy.linalg.blas import dsyrk
from torch import Tensor

from fusion.weights.precision import exact_device

# Singular values below this share of the largest one are zeros with rounding: such directions
# carry no information, and an SVD returns arbitrary vectors for them.
NEGLIGIBLE = 1e-6
# From this size on, LAPACK's routines for symmetric products and for a part of the eigenvectors,
# which torch does not expose, outweigh the cost of calling them.
LARGE = 96


def exact(matrices: Tensor) -> Tensor:
    """Return the matrices in float64, on a device that has it."""
    return matrices.to(device=exact_device(matrices.device), dtype=torch.float64)


def leading_components(
    matrices: Tensor, count: int, *, beside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` largest singular values of each matrix and their vectors.

    Args:
        matrices: (…, m, c).
        count: number of singular values, 0 to min(m, c).
        beside: (…), norms of the operands that the matrices are a difference of; values that are
            negligible relative to these count as rounding, too.

    Returns:
        Left vectors (…, m, count), singular values (…, count) from the largest, right vectors
        (…, c, count), all float64. Negligible values and their vectors are exactly 0.
    """
    matrices = exact(matrices)
    if matrices.shape[-2] > matrices.shape[-1]:
        right, values, left = leading_components(matrices.mT, count, beside=beside)
        return left, values, right
    squares, vectors = _largest_eigenpairs(_gram(matrices), count)
    values = squares.clamp(min=0).sqrt()
    inverse = _inverse(values, beside)
    values = values.where(inverse > 0, 0)
    left = vectors * (inverse > 0)[..., None, :]
    right = matrices.mT @ (left * inverse[..., None, :])
    return left, values, right


def polar(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest matrix with orthonormal rows or columns, and the singular values.

    For A = U S Vᵀ that is U Vᵀ, the solution of the orthogonal Procrustes problem; written as
    (A Aᵀ)^(-1/2) A it is a whitening. Directions with a negligible singular value are left out.

    Args:
        matrices: (…, m, c).

    Returns:
        (…, m, c) and (…, min(m, c)) from the largest, float64.
    """
    matrices = exact(matrices)
    if matrices.shape[-2] > matrices.shape[-1]:
        factor, values = polar(matrices.mT)
        return factor.mT, values
    squares, vectors = _largest_eigenpairs(_gram(matrices), matrices.shape[-2])
    values = squares.clamp(min=0).sqrt()
    whitening = (vectors * _inverse(values)[..., None, :]) @ vectors.mT
    return whitening @ matrices, values


def _gram(matrices: Tensor) -> Tensor:
    """Return A Aᵀ for each matrix; only the lower triangle is filled."""
    rows = matrices.shape[-2]
    if matrices.device.type != "cpu" or rows < LARGE:
        return matrices @ matrices.mT
    # A symmetric product takes half of the operations of a general one.
    grams = matrices.new_empty(*matrices.shape[:-2], rows, rows)
    for gram, matrix in zip(grams.view(-1, rows, rows), matrices.flatten(0, -3), strict=True):
        # BLAS takes columns: a matrix that is transposed in memory is passed without a copy.
        if matrix.mT.is_contiguous():
            product = dsyrk(1.0, matrix.numpy(), trans=0)
        else:
            product = dsyrk(1.0, matrix.contiguous().mT.numpy(), trans=1)
        gram.copy_(torch.from_numpy(product.T))
    return grams


def _largest_eigenpairs(grams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (…, count), from the largest, and vectors (…, m, count)."""
    rows = grams.shape[-1]
    if grams.device.type != "cpu" or rows < LARGE or not 0 < count <= rows // 2:
        values, vectors = torch.linalg.eigh(grams, UPLO="L")
        return values.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    # Reducing the matrix is a third of the work; the vectors that are not needed are the rest.
    values = grams.new_empty(*grams.shape[:-2], count)
    vectors = grams.new_empty(*grams.shape[:-1], count)
    each = (grams.view(-1, rows, rows), values.view(-1, count), vectors.view(-1, rows, count))
    for gram, value, vector in zip(*each, strict=True):
        found = linalg.eigh(
            gram.numpy(), lower=True, subset_by_index=[rows - count, rows - 1], check_finite=False
        )
        value.copy_(torch.from_numpy(found[0]).flip(0))
        vector.copy_(torch.from_numpy(found[1]).flip(1))
    return values, vectors


def _inverse(values: Tensor, beside: Tensor | None = None) -> Tensor:
    """Return 1/values, and 0 for values that are negligible relative to the largest."""
    if not values.numel():
        return values
    largest = values.amax(-1, keepdim=True)
    if beside is not None:
        largest = torch.maximum(largest, beside[..., None])
    present = values > NEGLIGIBLE * largest
    return torch.where(present, 1 / values.where(present, 1), 0)
