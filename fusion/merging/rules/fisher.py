"""The mean of the experts, each parameter weighted by its Fisher information."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusion.merging.rule import Need, Piece, Pieces, Rule
from fusion.options import Positive, checked


@checked
@dataclass(frozen=True, kw_only=True)
class Fisher(Rule):
    r"""The mean of the experts, each entry weighted by the diagonal of the Fisher information.

    .. math::

        \theta = \frac{\sum_i s_i F_i \odot \theta_i}{\sum_i s_i F_i}, \qquad
        F_i = \frac{1}{N} \sum_{x}
        \bigl(\nabla_\theta \log p(y \mid x; \theta_i)\bigr)^{\odot 2}

    Fisher merging (Matena and Raffel, 2022, arXiv 2111.09832, section 3). The gradients are squared
    for each example and then averaged; other implementations square the sum over a batch. Every
    parameter has a Fisher: kernels, norm parameters and biases are treated alike. Equal Fishers
    give the weighted mean, and n copies of an expert that expert, bit for bit. No base is needed.

    A piece brings ``statistics["fisher"]`` or ``statistics["empirical_fisher"]``, (n, *shape).

    Args:
        labels: ``model``: y is the network's prediction, as in the paper; ``true``: y is the label
            of the image, which makes it the empirical Fisher information.
        floor: smallest Fisher, above 0, relative to the root mean square over the network; where no
            expert has more, the experts are averaged. The reference's 1e-6 is absolute, but the
            Fishers of a well-fitted network may all be below that.
        normalise: whether each expert's Fisher is divided by its root mean square over the network
            first, as in the reference, so that an expert with a larger loss does not outweigh the
            others. ``False`` is the formula.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([0.0, 0.0]), torch.tensor([4.0, 4.0])]
        >>> fisher = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
        >>> merge_tensor(Fisher(), experts, statistics={"fisher": fisher}).round(decimals=3)
        tensor([3., 1.])
    """

    labels: Literal["model", "true"] = "model"
    floor: Positive = 1e-6
    normalise: bool = True

    elementwise = True

    @property
    def needs(self) -> frozenset[Need]:
        """Images and gradients; labels where the true ones are used."""
        images = Need.IMAGES if self.labels == "model" else Need.LABELS
        return frozenset({images, Need.GRADIENTS})

    @property
    def statistics(self) -> frozenset[str]:
        """The Fisher information by the chosen labels."""
        return frozenset({self._name})

    @property
    def _name(self) -> str:
        return "fisher" if self.labels == "model" else "empirical_fisher"

    def prepare(self, pieces: Pieces) -> tuple[float, ...]:
        """Return the divisor of each expert's Fisher."""
        squares: Tensor | None = None
        entries = 0
        for piece in pieces():
            fisher = piece.statistics[self._name].flatten(1).double()
            entries += fisher.shape[1]
            sums = fisher.square().sum(1).cpu()
            squares = sums if squares is None else squares + sums
        if squares is None:
            return ()
        if not self.normalise:
            squares = squares.mean().expand_as(squares)
        # An expert without any gradient has no level; its floor is the others'.
        return tuple(math.sqrt(square / entries) or 1.0 for square in squares.tolist())

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        first = piece.experts[0]
        moved = torch.zeros_like(first)
        weight = torch.zeros_like(first)
        fishers = piece.statistics[self._name]
        each = zip(piece.experts, fishers, piece.plan, piece.shares, strict=True)
        for expert, fisher, level, share in each:
            importance = (fisher / level).clamp(min=self.floor).to(first)
            moved.addcmul_(importance, expert - first, value=share)
            weight.add_(importance, alpha=share)
        return first + moved / weight
