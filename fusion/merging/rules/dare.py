"""Drop most of each task vector at random, rescale the rest, then merge by any rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusion.merging.rule import Piece, Pieces
from fusion.merging.rules.wrapping import WrappingRule
from fusion.options import Fraction, checked
from fusion.weights.random_mask import random_mask


@checked
@dataclass(frozen=True, kw_only=True)
class Dare(WrappingRule):
    r"""Another rule on task vectors most of whose entries are dropped and the rest rescaled.

    .. math::

        m_i \sim \operatorname{Bernoulli}(p), \qquad
        \hat\tau_i = m_i \odot \tau_i / p

    with the density p, so that each entry keeps its expectation. DARE (Yu et al., 2024, arXiv
    2311.03099, section 3.1; the paper's p is the share that is dropped). Kernels, norm parameters
    and biases are treated alike.

    The inner rule, its :meth:`prepare` included, sees experts :math:`\theta_0 + \hat\tau_i`. What
    is dropped depends on the seed, the tensor's name, the expert's name and the entry's position,
    not on the order of experts or on the parts in which a long tensor comes: the random words are
    those of a counter-based generator (:func:`fusion.weights.random_mask.random_mask`). At density
    1 nothing is dropped, and this is the inner rule bit for bit. For a rule with one tensor per
    task, the merged tensor is used.

    The paper drops 90 % and merges by task arithmetic or TIES; so do the defaults.

    Args:
        rule: the rule that merges the sparse task vectors.
        density: p, the share that is kept, in
            (0, 1].

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> from fusion.merging.rules import TaskArithmetic
        >>> base, expert = torch.zeros(8), torch.ones(8)
        >>> merge_tensor(Dare(rule=TaskArithmetic(scale=1.0), density=0.5), [expert], base, seed=3)
        tensor([2., 2., 2., 2., 0., 0., 2., 0.])
    """

    density: Fraction = 0.1

    @property
    def prepares_in_parts(self) -> bool:
        """As the inner rule: the masks do not depend on the parts."""
        return self.rule.prepares_in_parts

    def prepare(self, pieces: Pieces) -> Any:
        """Return the plan of the inner rule."""

        def sparse() -> Iterator[Piece]:
            return map(self._drop, pieces())

        return self.rule.prepare(sparse)

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        return self.rule.merge(self._drop(piece))

    def merge_affine(self, weight: Piece, bias: Piece) -> tuple[Tensor, Tensor]:
        """Return the merged weight and bias of one layer."""
        return self.rule.merge_affine(self._drop(weight), self._drop(bias))

    def _drop(self, piece: Piece) -> Piece:
        if self.density == 1:
            return piece
        experts = piece.experts.clone()
        for expert, name in zip(experts, piece.names, strict=True):
            seed = piece.seed_for("dare", name)
            kept = random_mask(expert.numel(), self.density, seed=seed, start=piece.start)
            change = (expert - piece.reference) / self.density
            expert.copy_(piece.reference)
            expert.add_(torch.where(kept.view(expert.shape).to(expert.device), change, 0))
        return replace(piece, experts=experts)
