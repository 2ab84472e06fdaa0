"""Sum the task matrices and make the spectrum of the sum flat: Iso-C."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.merging.rule import KernelLayout, MatrixRule, Piece
from fusion.options import checked
from fusion.weights.spectral import polar


@checked
@dataclass(frozen=True, kw_only=True)
class IsoC(MatrixRule):
    r"""The sum of the task matrices with all singular values replaced by their mean.

    .. math::

        U \Sigma V^T = \sum_i n s_i \tau_i, \qquad
        \theta = \theta_0 + \lambda\, \bar\sigma\, U V^T, \qquad
        \bar\sigma = \frac{1}{r} \sum_{j=1}^{r} \sigma_j

    Isotropic merging in the common subspace (Marczak et al., 2025, arXiv 2502.04959, section 4,
    algorithm 1), with the sum of the task matrices as in the paper, not their mean.

    A convolution of g groups is g matrices of out/g rows and in/g · kernel size columns; a fully
    connected layer is one. Other implementations take the weights of ``nn.Linear`` alone and
    average kernels. Norm parameters, biases and depthwise kernels, whose groups are vectors (of
    which this would be the sum), become the mean of the experts; ``scale`` does not reach them.

    Directions absent from the sum, with a singular value below 1e-6 of the largest one, are
    omitted, while an implementation by singular value decomposition gives arbitrary vectors the
    weight of all others. They count in the mean.

    Args:
        scale: λ, any finite number. The paper tunes it on validation data; the default is 1.
        kernel: layout of a kernel as a matrix: ``rows``, one for each output channel, or ``split``,
            (out · height) × (in · width), for comparison.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
        >>> merge_tensor(IsoC(), experts, torch.zeros(2, 2))
        tensor([[2., 0.],
                [0., 2.]])
    """

    scale: float = 1.0
    kernel: KernelLayout = "rows"

    def merge_matrices(self, piece: Piece, changes: Tensor) -> Tensor:
        """Return the merged change of one weight, (g, out/g, in/g · kernel size)."""
        directions, values = polar(piece.matrices(piece.summed_changes))
        return (self.scale * values.mean(-1)[:, None, None] * directions).to(changes)
