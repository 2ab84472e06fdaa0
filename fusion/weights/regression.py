"""The matrix that acts most nearly as several matrices do, each on inputs of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Below this a Cholesky factorisation in float64 may find a singular Gram matrix of some thousand
# columns indefinite.
LEAST_RIDGE = 1e-10


def regression_mean(
    towards: Tensor, terms: Iterable[tuple[Tensor, Tensor, float]], *, ridge: float
) -> Tensor:
    r"""Return the ridge regression of several linear maps.

    .. math::

        \min_W \sum_i w_i \operatorname{tr}\bigl((W - W_i)\, G_i\, (W - W_i)^T\bigr)
        + \rho \lVert W - W_0 \rVert^2,
        \qquad
        W = W_0 + \sum_i w_i (W_i - W_0)\, G_i \Bigl(\sum_i w_i G_i + \rho I\Bigr)^{-1}

    where :math:`W_0` is ``towards`` and :math:`\rho` is ``ridge`` times the mean of the diagonal of
    :math:`\sum_i w_i G_i`. Inputs that never occur (columns of zeros in all Gram matrices) keep
    :math:`W_0`, exactly.

    Args:
        towards: (…, m, d).
        terms: for each map its matrix (…, m, d), the Gram matrix of its inputs (…, d, d) and its
            weight; consumed once, one in memory at a time.
        ridge: relative to the Gram matrices, at least 1e-10.

    Returns:
        (…, m, d), float64.
    """
    towards = towards.double()
    columns = towards.shape[-1]
    total = towards.new_zeros(*towards.shape[:-2], columns, columns)
    pull = torch.zeros_like(towards)
    for matrix, gram, weight in terms:
        total.add_(gram, alpha=weight)
        pull.add_((matrix.double() - towards) @ gram.double(), alpha=weight)
    level = total.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = level.where(level > 0, 1)  # no input at all: any ridge keeps W_0
    total.diagonal(dim1=-2, dim2=-1).add_(ridge * level[..., None])
    # W - W_0 = pull / total, and total is symmetric.
    moved = torch.cholesky_solve(pull.mT, torch.linalg.cholesky(total)).mT
    return towards + moved
