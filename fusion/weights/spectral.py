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
from torch import Tensor

from fusion.weights.precision import exact_device

# Singular values below this share of the largest one are zeros with rounding: such directions
# carry no information, and an SVD returns arbitrary vectors for them.
NEGLIGIBLE = 1e-6
BLOCK = 128  # rows of a Gram matrix that are computed together
LARGE = 96  # rows from which on computing some of the eigenvectors outweighs the cost of the calls


def exact(matrices: Tensor) -> Tensor:
    """Return the matrices in float64, on a device that has it."""
    return matrices.to(device=exact_device(matrices.device), dtype=torch.float64)


def leading_components(
    matrices: Tensor,
    count: int,
    *,
    beside: Tensor | None = None,
    without: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` largest singular values of each matrix and their vectors.

    Args:
        matrices: (…, m, c).
        count: number of singular values, 0 to min(m, c).
        beside: (…), norms of the operands that the matrices are a difference of; values that are
            negligible relative to these count as rounding, too.
        without: (…, m, k), orthonormal columns or zeros L: the components are those of
            (I - L Lᵀ) A, a matrix of which only the Gram matrix is formed.

    Returns:
        Left vectors (…, m, count), singular values (…, count) from the largest, right vectors
        (…, c, count), all float64. Negligible values and their vectors are exactly 0.
    """
    matrices = exact(matrices)
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    gram = _gram(wide)
    if without is not None and tall:
        inside = without.mT @ matrices
        gram -= inside.mT @ inside
    elif without is not None:
        gram = gram.tril() + gram.tril(-1).mT
        gram = _projected(_projected(gram, without).mT, without)
    squares, near = _largest_eigenpairs(gram, count)
    values = squares.clamp(min=0).sqrt()
    inverse = _inverse(values, beside)
    values = values.where(inverse > 0, 0)
    near = near * (inverse > 0)[..., None, :]
    if without is not None and not tall:
        near = _projected(near, without)  # they are there already, up to rounding
    far = wide.mT @ (near * inverse[..., None, :])
    if without is not None and tall:
        far = _projected(far, without)
    return (far, values, near) if tall else (near, values, far)


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


def _projected(matrices: Tensor, without: Tensor) -> Tensor:
    """Return (I - L Lᵀ) A for the columns L of ``without``."""
    return matrices - without @ (without.mT @ matrices)


def _gram(matrices: Tensor) -> Tensor:
    """Return A Aᵀ for each matrix; only the lower triangle is filled."""
    grams = matrices.new_zeros(*matrices.shape[:-1], matrices.shape[-2])
    for start in range(0, matrices.shape[-2], BLOCK):
        # All columns up to the diagonal: a symmetric matrix takes half of the operations.
        stop = start + BLOCK
        rows = matrices[..., start:stop, :]
        grams[..., start:stop, :stop] = rows @ matrices[..., :stop, :].mT
    return grams


def _largest_eigenpairs(grams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues (…, count), from the largest, and vectors (…, m, count)."""
    rows = grams.shape[-1]
    if grams.device.type != "cpu" or rows < LARGE or not 0 < count <= rows // 2:
        values, vectors = torch.linalg.eigh(grams, UPLO="L")
        return values.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    # LAPACK can leave out the vectors that are not needed, two thirds of the work; torch cannot.
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
