"""Trim, elect, merge: TIES, over the whole task vector or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fusion.merging.rule import Need, Piece, Pieces, Rule
from fusion.options import Fraction, checked
from fusion.weights import ties
from fusion.weights.largest import kth_largest
from fusion.weights.ties_merging import sign_elected_mean, without_smaller

Scope = Literal["network", "tensor"]


@checked
@dataclass(frozen=True, kw_only=True)
class Ties(Rule):
    r"""The mean of the large changes that agree with the elected sign.

    Each task vector is trimmed to its largest entries, :math:`\hat\tau_i`; every entry elects the
    sign with the larger mass; the mean runs over the changes of that sign:

    .. math::

        \gamma = \operatorname{sgn}\Bigl(\sum_i s_i \hat\tau_i\Bigr), \qquad
        \theta = \theta_0 + \lambda\,
        \frac{\sum_{i \in A} s_i \hat\tau_i}{\sum_{i \in A} s_i}, \qquad
        A = \{i : \operatorname{sgn}(\hat\tau_i) = \gamma\}

    TIES-Merging (Yadav et al., 2023, arXiv 2306.01708, section 3 and algorithm 1). Kernels, norm
    parameters and biases are one vector and compete for the same places; integer counters, which
    other implementations trim along, do not pass through a rule.

    What is trimmed is decided over the whole network, as in the paper: :meth:`prepare` finds each
    expert's k-th largest magnitude, exactly, k = ceil(density · number of entries), in bounded
    memory. All entries of that magnitude or more are kept, so with equal magnitudes a few more than
    k. With ``scope="tensor"`` each tensor keeps its own share, which protects small tensors such as
    norm parameters; see :func:`fusion.weights.ties`.

    The reference implementation keeps 20 %, scales by 1 and lets an entry whose masses cancel
    follow the network's majority sign; here such an entry stays as in the base.

    Args:
        density: share of the entries of each task vector that is kept, in (0, 1].
        scale: λ, any finite number.
        scope: ``"network"`` or ``"tensor"``.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> base = torch.zeros(3)
        >>> experts = [torch.tensor([4.0, 1.0, 0.1]), torch.tensor([2.0, -3.0, 0.2])]
        >>> merge_tensor(Ties(density=0.6), experts, base)
        tensor([ 3., -3.,  0.])
    """

    density: Fraction = 0.2
    scale: float = 1.0
    scope: Scope = "network"

    needs = frozenset({Need.BASE})

    @property
    def elementwise(self) -> bool:
        """Whether tensors may be merged in parts: once the thresholds of the network are known."""
        return self.scope == "network"

    @property
    def prepares_in_parts(self) -> bool:
        """Always: magnitudes are counted, entry by entry."""
        return True

    def prepare(self, pieces: Pieces) -> tuple[float, ...] | None:
        """Return each expert's smallest magnitude that is kept; ``None`` with scope "tensor"."""
        if self.scope == "tensor":
            return None

        def magnitudes() -> Iterator[Tensor]:
            for piece in pieces():
                yield piece.changes.abs()

        return tuple(kth_largest(magnitudes, self.density))

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        base = piece.reference
        if self.scope == "tensor":
            experts = list(piece.experts)
            return ties(base, experts, piece.shares, density=self.density, scale=self.scale)
        trimmed = [
            without_smaller(change, threshold)
            for change, threshold in zip(piece.changes, piece.plan, strict=True)
        ]
        return base.add(sign_elected_mean(trimmed, piece.shares), alpha=self.scale)
