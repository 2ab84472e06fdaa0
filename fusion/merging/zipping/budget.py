"""The cut of a network at which all tasks together stay within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion.errors import UserError
from fusion.models import Head, multiply_adds
from fusion.models.cut import Cut, find_cuts, graph_of
from fusion.models.layers import without_values


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image.

    Attributes:
        body: of one network up to its head.
        joint: of all tasks' bodies together.
    """

    body: int
    joint: int

    @property
    def share(self) -> float:
        """All tasks' bodies, as a multiple of one network's."""
        return self.joint / max(self.body, 1)


def choose_cut(
    model: nn.Module,
    head: Head,
    example: Tensor,
    *,
    tasks: int,
    budget: float,
    dense: bool = False,
) -> tuple[Cut | None, Costs]:
    """Return the earliest cut at which trunk and tails together stay within the budget.

    Args:
        model: the network; its values do not matter.
        head: its head, which counts neither for the network nor for the tasks.
        example: an input of one image; only its shape matters.
        tasks: number of tails.
        budget: a multiple of one network's multiply-adds, 1 or more.
        dense: whether features are read out by a matrix, which costs multiply-adds as well.

    Returns:
        The cut, ``None`` where everything has to be shared; and its cost.

    Raises:
        UserError: the network cannot be traced, or runs a part of its head before its body.
    """
    bare = without_values(model).eval()
    cuts = find_cuts(bare)
    counting = _Counting(bare, graph_of(bare))
    counting.run(example.to("meta"))
    order = [node for node in counting.graph.nodes if node.op == "call_module"]
    layers = {str(node.target): node.name for node in reversed(order)}
    ends = [layers[_owner(key)] for key in head.tensors if _owner(key) in layers]
    if not ends:
        raise UserError(
            f"the head of {type(model).__name__} is no layer, so that the multiply-adds before it "
            f"cannot be counted; merge it whole: budget=null"
        )
    body = min(counting.before[end] for end in ends)
    for cut in cuts:
        trunk = counting.before[layers[cut.layer]]
        reading = sum(counting.reading(cut)) if dense else 0
        joint = trunk + tasks * (body - trunk + reading)
        if joint <= budget * body and trunk < body:
            return cut, Costs(body, joint)
    return None, Costs(body, body)


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


class _Counting(fx.Interpreter):
    """Interpreter of a graph that records the multiply-adds before each of its nodes."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.total = 0
        self.before: dict[str, int] = {}
        self.shapes: dict[str, Sequence[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        self.before[n.name] = self.total
        results: list[Any] = []
        self.total += multiply_adds(lambda: results.append(super(_Counting, self).run_node(n)))
        (value,) = results
        if isinstance(value, Tensor):
            self.shapes[n.name] = value.shape
        return value

    def reading(self, cut: Cut) -> list[int]:
        """Return the multiply-adds of reading each value out by a matrix."""
        found = []
        for one in cut.crossings:
            if one.source:
                elements = torch.Size(self.shapes[one.node]).numel()
                found.append(elements * one.channels)
        return found
