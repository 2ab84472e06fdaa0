"""Sums of products of columns: one for symmetric results, in which half of the work is saved."""

from __future__ import annotations

from torch import Tensor

# A symmetric product is split down to this many columns: 0.57 of the time of a full one for 2048
# columns, 0.7 for 512. BLAS's own routine (syrk) reaches 0.5 and 0.55, but torch does not have it.
_COLUMNS = 64
# Rows in one product of float32; products are added up in float64. So the error of an entry stays
# at some 1e-6 of the roots of its two diagonal entries, however many images there are.
ROWS = 1 << 13
# Memory limit for the pieces of an input that are rearranged for products at a time.
BYTES = 1 << 25


def add_symmetric_product(total: Tensor, rows: Tensor) -> None:
    """Add the product of ``rows`` with itself to the upper triangle of ``total``.

    Args:
        total: (g, c, c), float64; below the diagonal, its entries may change to anything.
        rows: (g, K, c), float32 or float64.
    """
    columns = rows.shape[-1]
    if columns <= _COLUMNS:
        total.add_(rows.mT @ rows)
        return
    half = columns // 2
    left, right = rows[..., :half], rows[..., half:]
    add_symmetric_product(total[:, :half, :half], left)
    add_symmetric_product(total[:, half:, half:], right)
    total[:, :half, half:].add_(left.mT @ right)


def mirrored(total: Tensor) -> Tensor:
    """Return the symmetric matrices whose upper triangles are those of ``total``, (…, c, c)."""
    return total.triu() + total.triu(1).mT
