"""Merge the leading singular vectors of all tasks, made orthogonal: TSV-Merge."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.merging.rule import MatrixRule, Piece
from fusion.merging.rules.options import require_scale
from fusion.weights.spectral import leading_components, polar


@dataclass(frozen=True, kw_only=True)
class TSVM(MatrixRule):
    r"""The sum of each task's leading singular components, after they have been made orthogonal.

    With the k leading components :math:`U_i \Sigma_i V_i^T` of each task matrix,
    :math:`k = \max(1, \lfloor r / n \rfloor)` of its r singular values,

    .. math::

        U = [U_1 \cdots U_n], \qquad V = [V_1 \cdots V_n], \qquad
        \theta = \theta_0 + \lambda\, U_\perp
        \operatorname{diag}(n s_1 \Sigma_1, \ldots, n s_n \Sigma_n)\, V_\perp^T

    where :math:`U_\perp = U (U^T U)^{-1/2}` is the nearest matrix with orthonormal columns. Task
    singular vectors (Gargiulo et al., 2025, arXiv 2412.00081, section 4: TSV-Merge, algorithm 1).

    A convolution of g groups is g matrices of out/g rows and in/g · kernel size columns; a fully
    connected layer is one. Other implementations take the weights of ``nn.Linear`` alone and
    average kernels. Norm parameters, biases and depthwise kernels, whose groups are vectors, become
    the mean of the experts, as in the paper for all that is no matrix (a sum would double a norm's
    scale); ``scale`` does not reach them.

    Where two tasks share a direction, U has fewer dimensions than columns, and a singular value
    decomposition would complete it by arbitrary ones. Here only the directions that are there
    count: n copies of an expert merge to the k leading components of its change.

    Args:
        scale: λ, any finite number; the paper recommends 1 without validation data.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))]
        >>> merge_tensor(TSVM(), experts, torch.zeros(2, 2)).abs()
        tensor([[4., 0.],
                [0., 2.]])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_scale("TSVM.scale", self.scale)

    def merge_matrices(self, piece: Piece, changes: Tensor) -> Tensor:
        """Return the merged change of one weight, (g, out/g, in/g · kernel size)."""
        n, rank = len(changes), min(changes.shape[-2:])
        left, values, right = leading_components(changes, max(1, rank // n))
        values = values * piece.relative_shares.to(values)[:, None, None]
        # (n, g, rows, k) -> (g, rows, n · k): the tasks side by side
        left, right = (v.permute(1, 2, 0, 3).flatten(2) for v in (left, right))
        weights = values.transpose(0, 1).flatten(1)
        merged = (polar(left)[0] * weights[:, None, :]) @ polar(right)[0].mT
        return (self.scale * merged).to(changes)
