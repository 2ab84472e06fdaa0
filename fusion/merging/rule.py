"""Base classes of merging rules, which map one tensor of one layer to the merged tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fusion.data import seed_from
from fusion.models import Layer
from fusion.models.layer import Kind
from fusion.weights import weighted_mean
from fusion.weights.operands import normalised_weights, working_operands

KernelLayout = Literal["rows", "split"]
"""Layout of a kernel as a matrix: out × (in · height · width), or (out · height) × (in · width)."""


class Need(Enum):
    """Requirements of a rule in addition to the experts."""

    BASE = "a pretrained model"
    IMAGES = "images without labels"
    LABELS = "labelled images"
    GRADIENTS = "gradients"


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of one layer, in the base and in every expert.

    All tensors are float32 or float64, contiguous and on one device; a rule must not write to
    them.

    Attributes:
        key: state-dict key of the tensor.
        layer: the layer that owns it.
        depth: position of the layer in the forward pass, from 0 (first) to 1 (last).
        base: the pretrained model's tensor, (*shape); ``None`` where there is no base.
        experts: the experts' tensors, (n, *shape).
        names: the experts' names.
        shares: the experts' coefficients in this layer, n numbers that sum to 1.
        statistics: the statistics named by ``Rule.statistics``; see
            :mod:`fusion.merging.statistics` for names and shapes.
        plan: the result of the rule's :meth:`Rule.prepare`.
        seed: of everything random in this tensor.
        bias: state-dict key that the bias of the layer has, if there is one.
        kernel: how :meth:`matrices` lays a two-dimensional kernel out; a rule sets it.
        start: flat position of the first entry in the whole tensor; 0 unless the piece is a part
            of a long tensor, as only elementwise rules receive it.
    """

    key: str
    layer: Layer
    depth: float
    base: Tensor | None
    experts: Tensor
    names: tuple[str, ...]
    shares: tuple[float, ...]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    plan: Any = None
    seed: int = 0
    bias: str = ""
    start: int = 0
    kernel: KernelLayout = "rows"

    @property
    def reference(self) -> Tensor:
        """The base's tensor.

        Raises:
            ValueError: there is none; a rule that uses it declares ``Need.BASE``.
        """
        if self.base is None:
            raise ValueError(f"'{self.key}' has no base; declare Need.BASE")
        return self.base

    @property
    def changes(self) -> Tensor:
        """The task vectors, expert minus base, (n, *shape)."""
        return self.experts - self.reference

    @property
    def relative_shares(self) -> Tensor:
        """The shares times n, (n,): all 1 where the experts count alike."""
        return self.experts.new_tensor(self.shares) * len(self.shares)

    @property
    def summed_changes(self) -> Tensor:
        """The task vectors times their relative shares, summed up, (*shape)."""
        total = torch.zeros_like(self.reference)
        for expert, share in zip(self.experts, self.shares, strict=True):
            total.add_(expert - self.reference, alpha=share * len(self.shares))
        return total

    def with_changes(self, changes: Tensor) -> Piece:
        """Return the piece with other task vectors, (n, *shape), from the same base."""
        return replace(self, experts=self.reference + changes)

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is a layer's weight and acts as a matrix of more than one row.

        Depthwise kernels have one row for each group: they are vectors.
        """
        shape = self.experts.shape[1:]
        if self.key != self.layer.weight or len(shape) < 2:
            return False
        if self.layer.kind == "conv_transpose":
            return shape[1] > 1
        return shape[0] // self.layer.groups > 1

    def matrices(self, tensor: Tensor) -> Tensor:
        """Return the weight as one matrix per group.

        Args:
            tensor: (…, *shape), a weight or a stack of weights of this layer.

        Returns:
            (…, g, out/g, in/g · kernel size): one row for each output unit; with ``kernel="split"``
            (…, g, out/g · height, in/g · width) for a convolution in two dimensions.
        """
        shape = self.experts.shape[1:]
        lead = tensor.shape[: tensor.ndim - len(shape)]
        g = self.layer.groups
        if self._is_split:
            split = tensor.reshape(*lead, g, shape[0] // g, *shape[1:]).transpose(-3, -2)
            return split.reshape(*lead, g, shape[0] // g * shape[2], shape[1] * shape[3])
        if self.layer.kind != "conv_transpose":
            return tensor.reshape(*lead, g, shape[0] // g, -1)
        # (in, out/g, *kernel): the inputs of a group are consecutive rows.
        split = tensor.reshape(*lead, g, shape[0] // g, shape[1], -1)
        return split.transpose(-3, -2).reshape(*lead, g, shape[1], -1)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """Return the weight (…, *shape) of given matrices, the inverse of :meth:`matrices`."""
        shape = self.experts.shape[1:]
        lead = matrices.shape[:-3]
        g = self.layer.groups
        if self._is_split:
            split = matrices.reshape(*lead, g, shape[0] // g, shape[2], shape[1], shape[3])
            return split.transpose(-3, -2).reshape(*lead, *shape)
        if self.layer.kind != "conv_transpose":
            return matrices.reshape(*lead, *shape)
        split = matrices.reshape(*lead, g, shape[1], shape[0] // g, -1)
        return split.transpose(-3, -2).reshape(*lead, *shape)

    @property
    def _is_split(self) -> bool:
        return self.kernel == "split" and self.layer.kind == "conv" and len(self.experts.shape) == 5

    def with_bias(self, matrices: Tensor, biases: Tensor) -> Tensor:
        """Return matrices with the bias as one more column: the map of inputs with a 1 behind them.

        Args:
            matrices: (…, g, out/g, columns), as :meth:`matrices` returns them.
            biases: (…, out).
        """
        column = biases.reshape(*matrices.shape[:-1], 1)
        return torch.cat([matrices, column.to(matrices)], -1)

    def without_bias(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight (*shape) and the bias (out,) of which :meth:`with_bias` made a map."""
        return self.from_matrices(maps[..., :-1].contiguous()), maps[..., -1].flatten()

    def seed_for(self, *names: str) -> int:
        """Return a seed that depends on the seed, the tensor's key and ``names`` only."""
        return seed_from(self.seed, self.key, *names)


Pieces = Callable[[], Iterator[Piece]]
"""Calling it walks through the tensors of the network in forward order, one in memory at a time.

They are whole, unless the rule ``prepares_in_parts``, and have the statistics that the rule
requests, but no plan yet.
"""


class Rule(ABC):
    """Base class of merging rules. Subclass it as a frozen dataclass and write :meth:`merge`.

    The pipeline calls :meth:`prepare` once, with all tensors that will be merged, and then
    :meth:`merge` for each of them (or :meth:`merge_affine`, for a rule that is ``affine``).
    Floating-point parameters pass through a rule; running statistics and integer buffers do not.

    The properties declare what the pipeline must provide. A subclass overrides them by plain class
    attributes, such as ``elementwise = True``; a rule that wraps another one forwards them.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Requirements of the rule; a pool that lacks one is refused before any work."""
        return frozenset()

    @property
    def statistics(self) -> frozenset[str]:
        """Names of the statistics of the experts' data that the rule reads from a piece."""
        return frozenset()

    @property
    def elementwise(self) -> bool:
        """Whether each entry of the result depends only on the same entry of the operands.

        The operands are the base, the experts and statistics of their shape; ``plan`` may say
        anything. Long tensors are then merged in parts, each with its ``start``.
        """
        return False

    @property
    def prepares_in_parts(self) -> bool:
        """Whether :meth:`prepare`, too, may be given long tensors in parts.

        A merge from file to file then needs memory for parts only. What :meth:`prepare` returns
        must not depend on the parts, not even by rounding.
        """
        return False

    @property
    def affine(self) -> bool:
        """Whether the weight and the bias of a layer are merged together."""
        return False

    @property
    def folded(self) -> bool:
        """Whether batch norm is folded into the layer before it: weight and bias are the whole map.

        Weights are then γ/σ · W, and the bias that of the norm; see :mod:`fusion.merging.folding`.
        """
        return False

    @property
    def sequential(self) -> bool:
        """Whether statistics are measured behind the layers that are merged already.

        Layers are then merged in stages, from the input to the output; see
        :mod:`fusion.merging.sequential`.
        """
        return False

    def prepare(self, pieces: Pieces) -> Any:
        """Process the whole network before the first tensor is merged; nothing by default.

        Returns:
            the value of ``piece.plan`` in :meth:`merge`.
        """
        del pieces

    @abstractmethod
    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""

    def merge_affine(self, weight: Piece, bias: Piece) -> tuple[Tensor, Tensor]:
        """Return the merged weight and bias of one layer.

        The pipeline calls this instead of :meth:`merge` for each layer whose weight and bias are
        both to be merged, if the rule is ``affine``. Statistics come with the weight.

        Args:
            weight: the layer's weight.
            bias: the same layer's bias, (out,) in each model.
        """
        return self.merge(weight), self.merge(bias)


class TaskRule(Rule):
    """A rule that can return a separate tensor for each expert's task, such as a masked common one.

    Attributes:
        per_task: whether the result has a network for each task, made by :meth:`separate`, instead
            of one network made by :meth:`merge`.
    """

    per_task: bool

    @abstractmethod
    def separate(self, piece: Piece) -> Tensor:
        """Return one tensor for each expert, (n, *shape)."""


class MatrixRule(Rule):
    """A rule on matrices: every weight is merged as the matrices of its groups.

    Other tensors (biases, norm parameters, depthwise kernels) become the mean of the experts,
    which is the base plus the mean of the changes, unless a subclass overrides
    :meth:`merge_other`.

    Attributes:
        kernel: layout of a kernel as a matrix; a subclass may make it an option.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    kernel: KernelLayout = "rows"

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        if not piece.is_matrix:
            return self.merge_other(piece)
        piece = replace(piece, kernel=self.kernel)
        merged = self.merge_matrices(piece, piece.matrices(piece.changes))
        return piece.reference + piece.from_matrices(merged)

    @abstractmethod
    def merge_matrices(self, piece: Piece, changes: Tensor) -> Tensor:
        """Return the merged change of one weight.

        Args:
            piece: the weight.
            changes: the task vectors as matrices, (n, g, out/g, in/g · kernel size).

        Returns:
            (g, out/g, in/g · kernel size).
        """

    def merge_other(self, piece: Piece) -> Tensor:
        """Return the merged tensor of a piece that is not a matrix, (*shape)."""
        return mean_of_experts(piece)


def mean_of_experts(piece: Piece) -> Tensor:
    """Return the weighted mean of the experts: the base plus the mean of their changes.

    The mean of n copies of a tensor is that tensor, bit for bit.
    """
    return weighted_mean(list(piece.experts), piece.shares)


def merge_tensor(
    rule: Rule,
    experts: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    shares: Sequence[float] | None = None,
    kind: Kind = "linear",
    groups: int = 1,
    statistics: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Merge the weight of one layer as if it were the whole network, to try out a rule.

    Args:
        rule: the rule.
        experts: the experts' weights, all of one shape.
        base: the pretrained weight, for rules that need it.
        shares: coefficients of the experts, equal by default; only their ratios count.
        kind: what the weight does.
        groups: groups of the convolution.
        statistics: statistics of the experts' data, as the rule reads them.
        seed: of everything random.

    Returns:
        The merged weight, in float32 or better.

    Raises:
        UserError: tensors or shares that cannot be merged.

    Example::

        >>> from fusion.merging.rules import Mean
        >>> merge_tensor(Mean(), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])])
        tensor([2., 2.])
    """
    operands = working_operands([*experts, *([] if base is None else [base])])
    if base is not None:
        base = operands.pop().contiguous()
    piece = Piece(
        key="weight",
        layer=Layer("", "weight", ("weight",), groups, kind, ()),
        depth=1.0,
        base=base,
        experts=torch.stack(operands),
        names=tuple(str(number) for number in range(len(operands))),
        shares=tuple(normalised_weights(shares, len(operands))),
        statistics=statistics or {},
        seed=seed,
    )
    return rule.merge(replace(piece, plan=rule.prepare(lambda: iter([piece]))))
