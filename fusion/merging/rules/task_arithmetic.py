"""The base plus the scaled sum of the experts' changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusion.merging.rule import Need, Piece, Rule
from fusion.options import checked


@checked
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Rule):
    r"""The base plus the scaled sum of the task vectors.

    .. math:: \theta = \theta_0 + \lambda \sum_i n s_i \tau_i, \qquad \tau_i = \theta_i - \theta_0

    Task arithmetic (Ilharco et al., 2023, arXiv 2212.04089, section 2, "learning via addition").
    The relative shares :math:`n s_i` are all 1 where the experts count alike, which is the paper's
    sum. Every parameter is treated alike: kernels, norm parameters and biases. Running statistics
    never pass through a rule; extrapolated by a sum, as other implementations have it, variances
    become negative.

    Args:
        scale: λ, any finite number; 1/n gives the mean. The paper tunes it on validation data; its
            recommendation without such data is 0.3 to 0.4, and 0.3 is the common default.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> base = torch.tensor([1.0, 1.0])
        >>> experts = [torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])]
        >>> merge_tensor(TaskArithmetic(scale=0.5), experts, base)
        tensor([2.0000, 1.5000])
    """

    scale: float = 0.3

    needs = frozenset({Need.BASE})
    elementwise = True

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        return piece.reference.add(piece.summed_changes, alpha=self.scale)
