"""Flatten the spectrum of common and task-specific directions together: Iso-CTS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import MatrixRule, Piece
from fusion.options import Share, checked
from fusion.weights.spectral import exact, leading_components, polar


@checked
@dataclass(frozen=True, kw_only=True)
class IsoCTS(MatrixRule):
    r"""Common directions of all tasks and task-specific directions, all equally strong.

    Of the r directions of a task matrix each task has :math:`q = \operatorname{round}((r - \lfloor
    c r \rfloor) / n)` of its own and :math:`k = r - n q` are common. With the k leading components
    :math:`U_0 \Sigma_0 V_0^T` of the sum :math:`\sum_i n s_i \tau_i`, and the q leading components
    :math:`U_i \Sigma_i V_i^T` of the remainder of each task,

    .. math:: n s_i \bigl(\tau_i - U_0 U_0^T \tau_i\bigr),

    all directions are put side by side, made orthogonal and given one singular value:

    .. math::

        \theta = \theta_0 + \lambda\, \bar\sigma\,
        [U_0\, U_1 \cdots U_n]_\perp\, [V_0\, V_1 \cdots V_n]_\perp^T, \qquad
        \bar\sigma = \frac{1}{r} \sum_{i=0}^{n} \operatorname{tr} \Sigma_i

    Isotropic merging in common and task-specific subspaces (Marczak et al., 2025, arXiv 2502.04959,
    section 4, algorithm 2). Matrices too small for a direction of every task (q = 0) are merged as
    in :class:`~fusion.merging.rules.iso_c.IsoC`, which also describes the treatment of kernels,
    norm parameters and biases, and of absent directions.

    Args:
        common_share: c, the share of directions that are common, in [0, 1]; 0.8 as in the paper.
        scale: λ, any finite number. The paper tunes it on validation data; the default is 1.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
        >>> merge_tensor(IsoCTS(common_share=0.0), experts, torch.zeros(2, 2)).abs()
        tensor([[2., 0.],
                [0., 2.]])
    """

    common_share: Share = 0.8
    scale: float = 1.0

    def merge_matrices(self, piece: Piece, changes: Tensor) -> Tensor:
        """Return the merged change of one weight, (g, out/g, in/g · kernel size)."""
        n, rank = len(changes), min(changes.shape[-2:])
        own = min(rank // n, round((rank - int(rank * self.common_share)) / n))
        total = piece.matrices(piece.summed_changes)
        if own == 0:
            directions, values = polar(total)
        else:
            norms = exact(torch.linalg.matrix_norm(changes).amax(0))
            components = [leading_components(total, rank - n * own, beside=norms)]
            common = components[0][0]
            for change, share in zip(changes, piece.relative_shares.tolist(), strict=True):
                own_part = leading_components(share * change, own, beside=norms, without=common)
                components.append(own_part)
            sides = zip(*components, strict=True)
            left, values, right = (torch.cat(parts, dim=-1) for parts in sides)
            directions = polar(left)[0].to(changes) @ polar(right)[0].mT.to(changes)
        return (self.scale * values.mean(-1)[:, None, None] * directions).to(changes)
