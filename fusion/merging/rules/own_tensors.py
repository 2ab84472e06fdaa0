"""The mean of all tensors except one kind, which each task keeps from its expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fusion.merging.rule import Piece, TaskRule, mean_of_experts
from fusion.options import checked

TensorKind = Literal["first", "early", "late", "pointwise", "affine"]


@checked
@dataclass(frozen=True, kw_only=True)
class OwnTensors(TaskRule):
    r"""The mean of the experts, with one kind of tensor kept for each task.

    .. math::
        \theta_{i,k} = \begin{cases} \theta^{(i)}_k & k \in K \\
        \sum_j s_j \theta^{(j)}_k & k \notin K \end{cases}

    This is an ablation rather than a method: the gain of a task from its own tensors of one kind
    measures the cost of merging that kind.

    Args:
        kind: ``first`` (the weight of the first layer), ``early`` and ``late`` (kernels of more
            than one pixel in the first and the second half of the depth), ``pointwise`` (kernels
            of one pixel and linear layers), ``affine`` (biases and norm parameters).
        per_task: whether each task gets its network; ``False`` gives the mean.

    Example::

        >>> import torch
        >>> from fusion.merging.rule import merge_tensor
        >>> merge_tensor(OwnTensors(kind="late"), [torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])
    """

    kind: TensorKind = "affine"
    per_task: bool = True

    def merge(self, piece: Piece) -> Tensor:
        """Return the mean, (*shape)."""
        return mean_of_experts(piece)

    def separate(self, piece: Piece) -> Tensor:
        """Return each task's tensor, (n, *shape)."""
        if kind_of(piece) == self.kind:
            return piece.experts
        return mean_of_experts(piece).expand_as(piece.experts)


def kind_of(piece: Piece) -> TensorKind:
    """Return the kind of a tensor, as :class:`OwnTensors` counts it."""
    if piece.key != piece.layer.weight:
        return "affine"
    if piece.depth == 0:
        return "first"
    if piece.experts[0].ndim < 3 or piece.experts[0, 0, 0].numel() == 1:
        return "pointwise"
    return "early" if piece.depth < 0.5 else "late"
