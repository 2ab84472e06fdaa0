"""Ridge regression: the matrix closest to several matrices, each on its own inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from fusion.options import Within

# Below this a Cholesky factorisation in float64 may find a singular Gram matrix of some thousand
# columns indefinite.
LEAST_RIDGE = 1e-10
Ridge = Annotated[float, Within(least=LEAST_RIDGE)]


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
    return towards + ridge_step(pull, total, ridge=ridge)


def ridge_step(pull: Tensor, gram: Tensor, *, ridge: float) -> Tensor:
    r"""Return the step :math:`P\,(G + \rho I)^{-1}` of a ridge regression.

    :math:`\rho` is ``ridge`` times the mean of the diagonal of G. Columns of zeros in G and P give
    zeros.

    Args:
        pull: P, (…, m, d) in float64.
        gram: G, (…, d, d) in float64: symmetric, positive semidefinite.
        ridge: relative to G, at least 1e-10.

    Returns:
        (…, m, d).
    """
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    level = level.where(level > 0, 1)  # no input at all: any ridge gives 0
    regular = gram.clone()
    regular.diagonal(dim1=-2, dim2=-1).add_(ridge * level[..., None])
    return torch.cholesky_solve(pull.mT, torch.linalg.cholesky(regular)).mT
