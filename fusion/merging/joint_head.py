"""One head for the classes of all experts, in closed form from the inputs of the experts' heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.merging.members import Members
from fusion.merging.statistics import Statistics
from fusion.modelpool import BaseModelPool
from fusion.models import Head, Layer
from fusion.weights.regression import ridge_step

RIDGE = 0.1
"""Chosen on the digits' validation images: the merged features differ from the experts', and a
head that fits the experts' features closely fits their differences. See scripts/cards_table.py."""


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Statistics of the inputs of one expert's head, by class.

    Attributes:
        gram: mean over images of x̃ x̃ᵀ, x̃ the features and a 1, (d + 1, d + 1).
        classes: mean over images of e_y x̃ᵀ, y the label, (outputs, d + 1).
        labels: the classes of the outputs.
    """

    gram: Tensor
    classes: Tensor
    labels: LabelSpace

    @property
    def seen(self) -> int:
        """Number of classes with images."""
        return int((self.classes[:, -1] > 0).sum())


def solve_head(
    experts: Sequence[ClassStatistics],
    labels: LabelSpace,
    *,
    bias: bool = True,
    ridge: float = RIDGE,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the linear least-squares classifier of all classes on the experts' features.

    .. math::

        \min_{W, b} \sum_i w_i \frac{1}{N_i} \sum_{x, y} \lVert W x + b - e_y \rVert^2
        + \rho \lVert W \rVert^2, \qquad
        W = C\,(\Sigma + \rho I)^{-1}, \quad b = \pi - W \mu

    with the mean μ and the covariance Σ of the features of all images, the shares π of the classes
    and the covariance C of classes and features: regression on indicators, in the form in which
    federated learning solves it from each owner's sums (Fanì et al., 2024, Fed3R, arXiv
    2406.01116). Each expert weighs as much as it has classes with images, so that balanced
    classes count alike. ρ is ``ridge`` times the mean of the diagonal of Σ.

    Args:
        experts: statistics of each expert's head; equal number of features d.
        labels: the classes of the result, in order.
        bias: whether the head has a bias.
        ridge: relative to the features' variance.

    Returns:
        weight (classes, d) and bias (classes,) or ``None``, float64.

    Raises:
        UserError: there are no images of a class.
    """
    total = sum(expert.seen for expert in experts)
    size = experts[0].gram.shape[-1]
    gram = experts[0].gram.new_zeros(size, size, dtype=torch.float64)
    classes = gram.new_zeros(len(labels), size)
    for expert in experts:
        part = expert.seen / total
        gram.add_(expert.gram, alpha=part)
        for place in range(len(labels)):
            own = expert.labels.positions(labels.select([place]))
            if own is not None:
                classes[place].add_(expert.classes[own[0]], alpha=part)
    empty = [labels.shown[place] for place in range(len(labels)) if not classes[place, -1] > 0]
    if empty:
        raise UserError(
            f"head=joint solves a head from each class's images, and there are none of "
            f"{', '.join(empty)}; leave these out of the classes, or choose head=union"
        )
    if not bias:
        return ridge_step(classes[:, :-1], gram[:-1, :-1], ridge=ridge), None
    mean, shares = gram[-1, :-1], classes[:, -1]
    covariance = gram[:-1, :-1] - mean[:, None] * mean
    weight = ridge_step(classes[:, :-1] - shares[:, None] * mean, covariance, ridge=ridge)
    return weight, shares - weight @ mean


def head_layer(network: nn.Module, layers: Sequence[Layer], head: Head) -> Layer:
    """Return the linear layer that is the head.

    Args:
        network: the architecture.
        layers: its layers.
        head: its head.

    Raises:
        UserError: the head is something else.
    """
    found = [layer for layer in layers if layer.weight in head]
    if len(found) == 1 and found[0].kind == "linear":
        weight = found[0].weight
        if set(head.tensors) <= {weight, _bias_of(weight)}:
            return found[0]
    raise UserError(
        f"head=joint solves one linear layer, and the head of {type(network).__name__} is "
        f"{', '.join(head.tensors)}; choose head=tasks or union"
    )


def joint_head(
    members: Members, modelpool: BaseModelPool, statistics: Statistics, labels: LabelSpace
) -> dict[str, Tensor]:
    """Return the tensors of one head for all classes; see :func:`solve_head`.

    The statistics are of the experts' features. So the head is exact where the merged network's
    features are the experts' (experts of one frozen body, or copies of one network), and an
    approximation elsewhere.

    Args:
        members: base and experts.
        modelpool: provides the experts' classes.
        statistics: ``gram`` and ``classes`` of the head.
        labels: the classes of the result.

    Raises:
        UserError: the head is no linear layer, or there are no images of a class.
    """
    layer = head_layer(members.network, members.layers, members.head)
    grams = statistics.each("gram", layer.weight)
    each = statistics.each("classes", layer.weight)
    found = []
    for name, gram, classes in zip(members.names, grams, each, strict=True):
        space = modelpool.labels(name)
        if gram is None or classes is None or space is None:
            raise UserError(
                f"head=joint needs the features of each class, and the head of '{name}' does not "
                f"receive one row of them for each image; choose head=tasks or union"
            )
        found.append(ClassStatistics(gram[0], classes, space))
    bias = _bias_of(layer.weight)
    weight, shift = solve_head(found, labels, bias=bias in members.head)
    return {layer.weight: weight} | ({} if shift is None else {bias: shift})


def _bias_of(weight: str) -> str:
    owner = weight.rpartition(".")[0]
    return f"{owner}.bias" if owner else "bias"
