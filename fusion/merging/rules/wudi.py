"""Merge task vectors so that they disturb each other least: WUDI-Merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import MatrixRule, Piece
from fusion.options import Count, Positive, checked
from fusion.weights.regression import Ridge
from fusion.weights.spectral import exact


@checked
@dataclass(frozen=True, kw_only=True)
class WUDI(MatrixRule):
    r"""The change closest to each task's change on that task's own inputs.

    A task matrix is a sum of gradients, so that its rows lie in the span of the inputs it was
    trained on. Taking its rows for those inputs, the interference of the merged change
    :math:`\tau` with all tasks is

    .. math::

        L(\tau) = \sum_i \frac{n s_i}{\lVert\tau_i\rVert_F^2}
        \bigl\lVert (\tau - \tau_i)\, \tau_i^T \bigr\rVert_F^2

    WUDI-Merging (Cheng et al., 2025, arXiv 2503.08099, section 4), which minimises it by 300 steps
    of Adam with a learning rate of 1e-5, from the sum :math:`\tau_\Sigma = \sum_i n s_i \tau_i`.

    L is quadratic: it is the loss of RegMean (:class:`~fusion.merging.rules.regmean.RegMean`) for
    the task vectors with the Gram matrices :math:`G_i = \tau_i^T \tau_i / \lVert\tau_i\rVert_F^2`.
    Its minimum is not unique, and a few small steps from the sum do not reach it. Both problems are
    solved by a ridge towards the sum, which has the closed form

    .. math::

        \tau = \tau_\Sigma + \sum_i n s_i (\tau_i - \tau_\Sigma)\, G_i
        \Bigl(\sum_i n s_i G_i + \rho I\Bigr)^{-1}

    with ρ = ``ridge``, relative to Gram matrices of trace 1. It needs no step size, is equivariant
    to a rescaling of all task vectors, and costs one factorisation. ρ = 1 gives about the result of
    the paper's 300 steps for task vectors of some 1e-3 to 1e-2 in each entry; smaller values follow
    the loss farther, as more or longer steps would. The default does, because the experts of
    ``docs/methods.md`` keep more of their accuracy with it.

    A convolution of g groups is g matrices of out/g rows and in/g · kernel size columns; other
    implementations take the weights of ``nn.Linear`` alone and average kernels. Norm parameters,
    biases and depthwise kernels become the mean of the experts.

    Args:
        ridge: 1e-10 or more; small values follow the loss, large ones the sum.
        iterations: steps of Adam instead of the closed form, 1 or more; 300 in the paper.
        learning_rate: of Adam, above 0; the paper's default. Not used in the closed form.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([2.0, 2.0]))]
        >>> merge_tensor(WUDI(ridge=1e-6), experts, torch.zeros(2, 2)).round(decimals=3)
        tensor([[3.3330, 0.0000],
                [0.0000, 2.0000]])
    """

    ridge: Ridge = 0.01
    iterations: Count | None = None
    learning_rate: Positive = 1e-5

    def merge_matrices(self, piece: Piece, changes: Tensor) -> Tensor:
        """Return the merged change of one weight, (g, out/g, in/g · kernel size)."""
        total = exact(piece.matrices(piece.summed_changes))
        inputs, targets = _interference(exact(changes), piece.relative_shares.tolist(), total)
        if self.iterations is None:
            moved = _closed_form(inputs, targets, self.ridge)
        else:
            moved = _adam(inputs, targets, self.iterations, self.learning_rate)
        return (total + moved).to(changes)


def _interference(changes: Tensor, shares: list[float], total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss as the squared norm of X Tᵀ - R, for the step X away from the sum.

    Returns:
        T (g, n · out/g, d), the task matrices as inputs, each of norm sqrt(n · share), and R
        (g, out/g, n · out/g), how each of them should be moved. A task that did not move has none.
    """
    inputs, targets = [], []
    for change, share in zip(changes, shares, strict=True):
        norm = torch.linalg.matrix_norm(change, keepdim=True)
        row = change * (share**0.5 / norm.where(norm > 0, 1))
        inputs.append(row)
        targets.append((change - total) @ row.mT)
    return torch.cat(inputs, dim=-2), torch.cat(targets, dim=-1)


def _closed_form(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return R T (TᵀT + ρ I)^-1, by the smaller of TᵀT and T Tᵀ."""
    rows, columns = inputs.shape[-2:]
    gram = inputs.mT @ inputs if columns <= rows else inputs @ inputs.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor = torch.linalg.cholesky(gram)
    if columns <= rows:
        return torch.cholesky_solve((targets @ inputs).mT, factor).mT
    return torch.cholesky_solve(targets.mT, factor).mT @ inputs


def _adam(inputs: Tensor, targets: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """Return the result of Adam on the loss, started at 0; the gradient is 2 (X Tᵀ - R) T."""
    moved = torch.zeros_like(targets @ inputs)
    optimizer = torch.optim.Adam([moved], lr=learning_rate)
    for _ in range(iterations):
        moved.grad = 2 * (moved @ inputs.mT - targets) @ inputs
        optimizer.step()
    return moved
