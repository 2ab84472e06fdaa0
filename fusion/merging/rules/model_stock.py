"""Model Stock: interpolate from base to mean by the angle between task vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import Need, Piece, Rule, mean_of_experts
from fusion.options import checked
from fusion.weights.gram import gram_matrix


@checked
@dataclass(frozen=True)
class ModelStock(Rule):
    r"""The point between the base and the experts' mean that is nearest to their common centre.

    .. math::

        \theta = t\, \bar\theta + (1 - t)\, \theta_0, \qquad
        t = \frac{n \cos\alpha}{1 + (n - 1) \cos\alpha}

    with the angle :math:`\alpha` between two task vectors, tensor by tensor. Model Stock (Jang et
    al., 2024, arXiv 2403.19522, section 4: t of n models; 2 cos α / (1 + cos α) for two). For more
    than two experts the cosine is the mean over all pairs, weighted by the products of their
    shares, as the derivation takes all angles for equal.

    Every tensor has its own angle: kernels, norm parameters and biases. Where the cosine is 0 or
    less, t is 0 and the base stays; the formula would move away from the experts. A task vector of
    zeros has no direction and counts as orthogonal to all. A single expert is returned.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> base = torch.zeros(2)
        >>> experts = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])]
        >>> merge_tensor(ModelStock(), experts, base)  # the angle is 45 degrees
        tensor([0.8284, 0.4142])
    """

    needs = frozenset({Need.BASE})

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        ratio = self._ratio(piece)
        return torch.lerp(piece.reference, mean_of_experts(piece), ratio)

    def _ratio(self, piece: Piece) -> float:
        n = len(piece.names)
        if n == 1:
            return 1.0
        products = gram_matrix(list(piece.changes)).cpu()
        norms = products.diagonal().sqrt()
        lengths = norms.where(norms > 0, 1)
        cosines = products / torch.outer(lengths, lengths)
        shares = torch.tensor(piece.shares, dtype=torch.float64)
        pairs = torch.outer(shares, shares).fill_diagonal_(0)
        if not pairs.any():  # one expert has the whole share
            return 1.0
        cosine = min(max(float((cosines * pairs).sum() / pairs.sum()), 0.0), 1.0)
        return n * cosine / (1 + (n - 1) * cosine)
