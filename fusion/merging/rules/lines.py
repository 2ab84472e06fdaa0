"""Scale the merged change by depth: little in the first layers, more in the last ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fusion.merging.rule import Piece, Pieces, Rule, mean_of_experts
from fusion.merging.rules.task_arithmetic import TaskArithmetic
from fusion.merging.rules.wrapping import WrappingRule
from fusion.options import NonNegative, checked


@dataclass(frozen=True)
class _Slope:
    """The factor of the first layer, and the plan of the inner rule."""

    first: float
    inner: Any


@checked
@dataclass(frozen=True, kw_only=True)
class LiNeS(WrappingRule):
    r"""Another rule whose merged change grows linearly with the depth of the layer.

    .. math::

        \theta^{(\ell)} = \theta_0^{(\ell)} + \Bigl(\alpha + \beta \frac{\ell - 1}{L - 1}\Bigr)
        \bigl(\theta_\text{inner}^{(\ell)} - \theta_0^{(\ell)}\bigr)

    for layers :math:`\ell = 1, …, L` in the order of the forward pass. LiNeS (Wang et al., 2024,
    arXiv 2410.17146): section 4 has the scaling; for merging it is applied to the change that the
    inner rule has merged, not to the task vectors before that, and α is chosen such that the first
    layer moves as the mean of the experts would:

    .. math:: \alpha = \frac{1}{n} \frac{\lVert\sum_i \tau_i\rVert}{\lVert\tau_\text{inner}\rVert}

    with norms over the whole network. All tensors of a layer (kernel, bias, norm parameters) have
    the layer's factor. The paper counts transformer blocks and gives what lies outside of them α;
    here every convolution and linear layer counts, so that stem and last layer have the smallest
    and the largest factor. For a rule with one tensor per task, the merged tensor is used.

    Args:
        rule: the rule that merges the task vectors; as in the paper, their plain sum by default.
        alpha: factor of the first layer, 0 or more; by default the α above, for which
            :meth:`prepare` merges the whole network once more, tensor by tensor.
        beta: what the last layer's factor exceeds the first one's by. The paper tunes it on
            validation data; the default is ours. Nothing is scaled with ``alpha=1, beta=0``.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor  # one layer, the last
        >>> rule = LiNeS(rule=TaskArithmetic(scale=1.0), alpha=0.1, beta=0.4)
        >>> merge_tensor(rule, [torch.tensor([2.0, 4.0])], torch.zeros(2))
        tensor([1., 2.])
    """

    rule: Rule = field(default_factory=lambda: TaskArithmetic(scale=1.0))
    alpha: NonNegative | None = None
    beta: float = 0.5

    def prepare(self, pieces: Pieces) -> _Slope:
        """Return the factor of the first layer and the plan of the inner rule."""
        plan = self.rule.prepare(pieces)
        if self.alpha is not None:
            return _Slope(self.alpha, plan)
        mean = merged = 0.0
        for piece in pieces():
            change = self.rule.merge(replace(piece, plan=plan)) - piece.reference
            merged += float(change.double().square().sum())
            mean += float((mean_of_experts(piece) - piece.reference).double().square().sum())
        return _Slope(math.sqrt(mean / merged) if merged else 1.0, plan)

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        return self._scale(piece, self.rule.merge(self._inner(piece)))

    def merge_affine(self, weight: Piece, bias: Piece) -> tuple[Tensor, Tensor]:
        """Return the merged weight and bias of one layer."""
        merged = self.rule.merge_affine(self._inner(weight), self._inner(bias))
        return self._scale(weight, merged[0]), self._scale(bias, merged[1])

    def _inner(self, piece: Piece) -> Piece:
        return replace(piece, plan=piece.plan.inner)

    def _scale(self, piece: Piece, merged: Tensor) -> Tensor:
        factor = piece.plan.first + self.beta * piece.depth
        if factor == 1:
            return merged
        return piece.reference.add(merged - piece.reference, alpha=factor)
