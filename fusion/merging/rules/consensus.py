"""Task arithmetic on the weights that several tasks use: TALL masks and their consensus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.merging.rule import Need, Piece, Pieces, TaskRule
from fusion.options import NonNegative, Whole, checked


@checked
@dataclass(frozen=True, kw_only=True)
class ConsensusTA(TaskRule):
    r"""Task arithmetic without the weights that one task alone uses, or none.

    With the multi-task vector :math:`\tau = \sum_i n s_i \tau_i`, a task uses the entries of its
    TALL mask

    .. math::

        m_i = \mathbb{1}\bigl\{\lvert\tau_i\rvert \ge \lambda_m \lvert\tau - \tau_i\rvert\bigr\},
        \qquad
        \theta = \theta_0 + \lambda\,
        \mathbb{1}\Bigl\{\sum_i m_i \ge k\Bigr\} \odot \tau

    TALL masks and consensus task arithmetic (Wang et al., 2024, arXiv 2405.07813, sections 3 and
    4). :meth:`separate` returns each task's own localised network,
    :math:`\theta_0 + m_i \odot \tau`, by which the paper compresses n experts into one vector and n
    masks. Kernels, norm parameters and biases are treated alike.

    Entries that no task moved are in every mask, where τ is 0 anyway.

    Args:
        scale: λ of the merged network, any finite number, 0.3 as in task arithmetic; the paper
            tunes it on validation data. The separate networks are not scaled.
        mask_threshold: :math:`\lambda_m`, 0 or more; larger masks have fewer entries. The paper
            tunes it for each task among 0.2, 0.3, …, 0.6; the default is the middle.
        minimum_tasks: k, the number of tasks that must use a weight; 2 as in the paper drops
            selfish (one task) and catastrophic (no task) weights, 1 catastrophic ones only, 0 none.
        per_task: whether each task gets a separate network, made by its mask (TALL masks), instead
            of one network made by the consensus.

    Raises:
        UserError: an option is outside of its range, or there are fewer experts than
            ``minimum_tasks``.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([4.0, 1.0, 2.0]), torch.tensor([2.0, 9.0, -2.0])]
        >>> merge_tensor(ConsensusTA(scale=0.5), experts, torch.zeros(3))
        tensor([3., 0., 0.])
    """

    scale: float = 0.3
    mask_threshold: NonNegative = 0.4
    minimum_tasks: Whole = 2
    per_task: bool = False

    needs = frozenset({Need.BASE})
    elementwise = True

    def prepare(self, pieces: Pieces) -> None:
        """Check that there are enough tasks.

        Raises:
            UserError: they are fewer than ``minimum_tasks``, so that nothing would be merged.
        """
        first = next(pieces(), None)
        if first is not None and len(first.names) < self.minimum_tasks:
            raise UserError(
                f"ConsensusTA keeps what {self.minimum_tasks} tasks use, of {len(first.names)} "
                f"expert(s); set minimum_tasks to {len(first.names)} or less"
            )

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        total = piece.summed_changes
        votes = self._masks(piece, total).sum(0)
        agreed = torch.where(votes >= self.minimum_tasks, total, 0)
        return piece.reference.add(agreed, alpha=self.scale)

    def separate(self, piece: Piece) -> Tensor:
        """Return the base plus the task vector under each task's mask, (n, *shape)."""
        total = piece.summed_changes
        return piece.reference + torch.where(self._masks(piece, total), total, 0)

    def _masks(self, piece: Piece, total: Tensor) -> Tensor:
        changes = piece.changes
        return changes.abs() >= self.mask_threshold * (total - changes).abs()
