"""Merge the leading singular vectors of all tasks, made orthogonal: TSV-Merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import KernelLayout, MatrixRule, Piece
from fusion.options import checked
from fusion.weights.spectral import leading_components, polar


@checked
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
    the mean of the experts, as in the paper for all tensors that are not matrices (a sum would
    double a norm's scale); ``scale`` does not apply to them.

    Where two tasks share a direction, U has fewer dimensions than columns, and a singular value
    decomposition would complete it by arbitrary ones. Here only existing directions count: n copies
    of an expert merge to the k leading components of its change.

    Args:
        scale: λ, any finite number; the paper recommends 1 without validation data.
        kernel: layout of a kernel as a matrix: ``rows``, one for each output channel, or ``split``,
            (out · height) × (in · width), for comparison.

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
    kernel: KernelLayout = "rows"

    def merge_matrices(self, piece: Piece, changes: Tensor) -> Tensor:
        """Return the merged change of one weight, (g, out/g, in/g · kernel size)."""
        count = max(1, min(changes.shape[-2:]) // len(changes))
        tasks = [leading_components(change, count) for change in changes]
        left, right = (torch.cat([task[side] for task in tasks], dim=-1) for side in (0, 2))
        shares = piece.relative_shares.tolist()
        strengths = [share * task[1] for share, task in zip(shares, tasks, strict=True)]
        weights = self.scale * torch.cat(strengths, dim=-1)[:, None, :]
        # Two orthonormal factors: their product loses nothing in the weights' own precision.
        return (polar(left)[0] * weights).to(changes) @ polar(right)[0].mT.to(changes)
