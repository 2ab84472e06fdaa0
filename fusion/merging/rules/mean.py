"""The weighted mean of the experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.merging.rule import Piece, Rule, mean_of_experts
from fusion.options import checked


@checked
@dataclass(frozen=True)
class Mean(Rule):
    r"""The mean of the experts, weighted by their shares.

    .. math:: \theta = \sum_i s_i \theta_i, \qquad \sum_i s_i = 1

    Model soups (Wortsman et al., 2022, arXiv 2203.05482, section 2: the uniform soup) with equal
    shares, weighted averaging otherwise. Every tensor is averaged alike: kernels, norm parameters
    and biases. No base is needed. The mean of n copies of an expert is that expert, bit for bit.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([0.0, 4.0]), torch.tensor([4.0, 4.0])]
        >>> merge_tensor(Mean(), experts, shares=[3, 1])
        tensor([1., 4.])
    """

    elementwise = True

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        return mean_of_experts(piece)
