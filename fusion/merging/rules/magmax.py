"""The largest change of each entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import Need, Piece, Rule
from fusion.options import checked


@checked
@dataclass(frozen=True, kw_only=True)
class MagMax(Rule):
    r"""Entry by entry, the change of the expert with the largest change.

    .. math::

        \theta = \theta_0 + \lambda\, \tau_{i^*}, \qquad
        i^* = \operatorname{argmax}_i\, s_i \lvert\tau_i\rvert

    MagMax (Marczak et al., 2024, arXiv 2407.06322, section 4). Shares weigh the comparison, not the
    change that wins it. Experts that tie with different signs leave the entry as in the base (the
    paper leaves this open, and in an implementation the first expert wins): after a step of Adam
    such ties are many, and the result must not depend on the order of experts. Kernels, norm
    parameters and biases are treated alike.

    Args:
        scale: λ, any finite number. The reference's script for merging eight data sets uses 0.5;
            1 merges n copies of an expert to that expert.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, -3.0])]
        >>> merge_tensor(MagMax(scale=1.0), experts, torch.zeros(2))
        tensor([ 4., -3.])
    """

    scale: float = 0.5

    needs = frozenset({Need.BASE})
    elementwise = True

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        changes = piece.changes
        shares = piece.relative_shares.view(-1, *[1] * (changes.ndim - 1))
        strength = changes.abs() * shares
        farthest = strength == strength.amax(0)
        highest = torch.where(farthest, changes, -torch.inf).amax(0)
        lowest = torch.where(farthest, changes, torch.inf).amin(0)
        winner = torch.where(lowest > 0, highest, torch.where(highest < 0, lowest, 0))
        return piece.reference.add(winner, alpha=self.scale)
