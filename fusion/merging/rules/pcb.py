"""Let the experts compete for every parameter: PCB-Merging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merging.rule import Need, Piece, Pieces, Rule
from fusion.options import Fraction, checked
from fusion.weights.largest import kth_largest


@dataclass(frozen=True)
class _Balance:
    """Range of the softmaxes: the products of two task vectors across the network.

    Attributes:
        low: (n, n) smallest products.
        span: (n, n) largest minus smallest ones.
        own: (n,) means of exp(n · Norm(τ_i²)) over the network.
        pair: (n, n) means of exp(Norm(τ_i · τ_j)).
        thresholds: the smallest score of each expert that is kept.
    """

    low: Tensor
    span: Tensor
    own: Tensor
    pair: Tensor
    thresholds: tuple[float, ...] = ()


@checked
@dataclass(frozen=True, kw_only=True)
class PCB(Rule):
    r"""The mean of the task vectors, each entry weighted by its competition score.

    .. math::

        \beta_i = \operatorname{Softmax}\bigl(n \operatorname{Norm}(\tau_i \odot \tau_i)\bigr)
        \odot \sum_j \operatorname{Softmax}\bigl(\operatorname{Norm}(\tau_i \odot \tau_j)\bigr),
        \qquad
        \theta = \theta_0 + \lambda\,
        \frac{\sum_i s_i \hat\beta_i \odot \tau_i}{\sum_i s_i \hat\beta_i}

    where :math:`\hat\beta_i` keeps the largest entries of :math:`\beta_i` and is 0 elsewhere, and
    Norm maps the smallest entry to 0 and the largest to 1. The first factor balances the parameters
    of one expert (intra-balancing), the second one those of different experts (inter-balancing).
    Parameter competition balancing (Du et al., 2024, arXiv 2410.02396, equations 1 to 4).

    Norm, both softmaxes and the choice of the largest entries run over the whole network, as in the
    paper; :meth:`prepare` walks through it four times (six in float64) and keeps a few numbers.
    Kernels, norm parameters and biases are treated alike. An entry that no expert keeps stays as in
    the base.

    The reference implementation replaces the second softmax by tanh without Norm and clips each
    task vector's extreme entries; this is the formula of the paper. The reference function keeps 10
    % by default, and its script scales by 1.2; without validation data, 1 merges n copies of an
    expert to that expert.

    Args:
        density: share of the entries of each :math:`\beta_i` that is kept, in (0, 1].
        scale: λ, any finite number.

    Raises:
        UserError: an option is outside of its range.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> experts = [torch.tensor([4.0, 1.0, 0.1]), torch.tensor([2.0, -3.0, 0.2])]
        >>> merge_tensor(PCB(density=0.6), experts, torch.zeros(3))
        tensor([ 3.6429, -2.6279,  0.0000])
    """

    density: Fraction = 0.1
    scale: float = 1.0

    needs = frozenset({Need.BASE})
    elementwise = True

    def prepare(self, pieces: Pieces) -> _Balance | None:
        """Return the sums of the softmaxes and the thresholds of the network."""
        low = high = None
        for piece in pieces():
            changes = piece.changes.flatten(1)
            least = torch.stack([(changes * row).amin(1) for row in changes]).double().cpu()
            most = torch.stack([(changes * row).amax(1) for row in changes]).double().cpu()
            low = least if low is None else torch.minimum(low, least)
            high = most if high is None else torch.maximum(high, most)
        if low is None or high is None:
            return None
        n = len(low)
        ones = _Balance(low, high - low, torch.ones(n), torch.ones(n, n))
        own = torch.zeros(n, dtype=torch.float64)
        pair = torch.zeros(n, n, dtype=torch.float64)
        entries = 0
        for piece in pieces():
            changes = piece.changes.flatten(1)
            entries += changes.shape[1]
            for i in range(n):
                own[i] += _intra(changes, i, ones).sum(dtype=torch.float64).cpu()
                for j in range(n):
                    pair[i, j] += _inter(changes, i, j, ones).sum(dtype=torch.float64).cpu()
        balance = _Balance(low, high - low, own / entries, pair / entries)

        def scores() -> Iterator[Tensor]:
            for piece in pieces():
                yield _scores(piece.changes, balance)

        thresholds = tuple(kth_largest(scores, self.density))
        return _Balance(balance.low, balance.span, balance.own, balance.pair, thresholds)

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        changes = piece.changes
        total = torch.zeros_like(piece.reference)
        weight = torch.zeros_like(total)
        scores = _scores(changes, piece.plan)
        each = zip(changes, scores, piece.plan.thresholds, piece.shares, strict=True)
        for change, score, threshold, share in each:
            kept = torch.where(score >= threshold, score, 0)
            total.add_(kept * change, alpha=share)
            weight.add_(kept, alpha=share)
        return piece.reference.add(total / weight.where(weight > 0, 1), alpha=self.scale)


def _scores(changes: Tensor, balance: _Balance) -> Tensor:
    """Return β of each expert, relative to what all entries alike would have; (n, …)."""
    n = len(changes)
    scores = torch.zeros_like(changes)
    for i in range(n):
        for j in range(n):
            scores[i] += _inter(changes, i, j, balance)
        scores[i] *= _intra(changes, i, balance)
    return scores


def _intra(changes: Tensor, i: int, balance: _Balance) -> Tensor:
    return (len(changes) * _norm(changes, i, i, balance)).exp_() / float(balance.own[i])


def _inter(changes: Tensor, i: int, j: int, balance: _Balance) -> Tensor:
    return _norm(changes, i, j, balance).exp_() / float(balance.pair[i, j])


def _norm(changes: Tensor, i: int, j: int, balance: _Balance) -> Tensor:
    """Map the products of two task vectors to [0, 1] by their extremes in the network."""
    span = float(balance.span[i, j]) or 1.0
    return (changes[i] * changes[j] - float(balance.low[i, j])) / span
