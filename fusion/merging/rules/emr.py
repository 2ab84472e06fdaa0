"""Elect one task vector; mask and rescale it for each task: EMR-Merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import Need, Piece, Pieces, TaskRule
from fusion.options import checked


@checked
@dataclass(frozen=True, kw_only=True)
class EMR(TaskRule):
    r"""One elected task vector, and for each task a mask and a factor.

    .. math::

        \tau = \gamma \odot \max_{i:\, \operatorname{sgn}\tau_i = \gamma} \lvert\tau_i\rvert,
        \qquad
        \gamma = \operatorname{sgn}\Bigl(\sum_i s_i \tau_i\Bigr),
        \qquad
        \theta_i = \theta_0 + \lambda_i\, M_i \odot \tau

    .. math::

        M_i = \mathbb{1}\{\tau_i \odot \tau > 0\}, \qquad
        \lambda_i = \frac{\sum \lvert\tau_i\rvert}{\sum \lvert M_i \odot \tau\rvert}

    EMR-Merging (Huang et al., 2024, arXiv 2405.17461, section 3 and algorithm 1). The sums of
    :math:`\lambda_i` run over the whole network, as in the paper; :meth:`prepare` walks through it
    once. Kernels, norm parameters and biases are treated alike.

    :meth:`separate` returns the networks :math:`\theta_i`, which are the method; :meth:`merge`
    returns the unified one, :math:`\theta_0 + \tau`, which the paper does not use by itself. Shares
    weigh the election only.

    Args:
        per_task: whether each task gets its network; ``False`` gives the unified one.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, -3.0])]
        >>> merge_tensor(EMR(), experts, torch.zeros(2))
        tensor([ 4., -3.])
    """

    per_task: bool = True

    needs = frozenset({Need.BASE})
    elementwise = True

    def prepare(self, pieces: Pieces) -> tuple[float, ...]:
        """Return the factor of each task."""
        own = masked = None
        for piece in pieces():
            changes = piece.changes.flatten(1)
            elected = _elect(changes, piece.shares)
            passed = torch.where(_masks(changes, elected), elected.abs(), 0)
            sums = (changes.abs().sum(1, dtype=torch.float64), passed.sum(1, dtype=torch.float64))
            own = sums[0].cpu() if own is None else own + sums[0].cpu()
            masked = sums[1].cpu() if masked is None else masked + sums[1].cpu()
        if own is None or masked is None:
            return ()
        # A task whose mask is empty needs no factor.
        return tuple(torch.where(masked > 0, own / masked.where(masked > 0, 1), 1).tolist())

    def merge(self, piece: Piece) -> Tensor:
        """Return the unified tensor, (*shape)."""
        return piece.reference + _elect(piece.changes, piece.shares)

    def separate(self, piece: Piece) -> Tensor:
        """Return each task's tensor, (n, *shape)."""
        changes = piece.changes
        elected = _elect(changes, piece.shares)
        factors = changes.new_tensor(piece.plan).view(-1, *[1] * (changes.ndim - 1))
        return piece.reference + factors * torch.where(_masks(changes, elected), elected, 0)


def _elect(changes: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Return the largest change of the elected sign, entry by entry; 0 where the vote is drawn."""
    mass = torch.zeros_like(changes[0])
    for change, share in zip(changes, shares, strict=True):
        mass.add_(change, alpha=share)
    sign = mass.sign()
    return (changes * sign).amax(0).clamp(min=0) * sign


def _masks(changes: Tensor, elected: Tensor) -> Tensor:
    """Return where each change has the elected sign, (n, …); signs, as a product may underflow."""
    return (changes.sign() == elected.sign()) & (elected != 0)
