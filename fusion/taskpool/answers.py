"""The outputs of a network that answer a task, matched by classes and never by position."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusion.labels import LabelSpace, joint_space
from fusion.models import MultiTaskNetwork

log = logging.getLogger(__name__)

JointRule = Literal["softmax", "raw"]
Call = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Answer:
    """The way in which one network answers one task.

    Attributes:
        networks: the networks whose outputs are used.
        rule: how several become one row of scores: ``one`` (there is one), ``mean`` (of their
            class probabilities), ``softmax`` or ``raw`` (the classes of all side by side, as
            probabilities within each network's own or as they are).
        space: the classes of the scores; ``None`` where they are unknown.
    """

    networks: tuple[nn.Module, ...]
    rule: str
    space: LabelSpace | None

    def scores(self, images: Tensor, call: Call) -> Any:
        """Return the scores (n, classes), logits or logarithms of probabilities.

        Args:
            images: (n, C, H, W).
            call: runs a network on images.
        """
        outputs = [call(network, images) for network in self.networks]
        if self.rule == "one":
            return outputs[0]
        if self.rule == "raw":
            return torch.cat(outputs, dim=1)
        shares = [output.float().log_softmax(1) for output in outputs]
        if self.rule == "mean":
            return torch.stack(shares).logsumexp(0) - math.log(len(shares))
        return torch.cat(shares, dim=1) - math.log(len(shares))

    def columns(self, classes: LabelSpace | None, outputs: int) -> list[int] | None:
        """Return the index of the score of each class of a task; ``None`` if it has no answer.

        Where the classes of the task or of the network are unknown, they are taken to be the same
        if there are equally many.
        """
        if self.space is not None and classes is not None:
            return self.space.positions(classes)
        if classes is None or len(classes) != outputs:
            return None
        return list(range(outputs))


class Ensemble(nn.Module):
    """An ensemble: the mean of the probabilities of the networks that know a task.

    Args:
        networks: name → network.
        labels: name → the classes of its outputs.
        tasks: name → the task that it was made for.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        labels: Mapping[str, LabelSpace | None],
        tasks: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks.values())
        self.names = tuple(networks)
        self.labels = dict(labels)
        self.tasks = dict(tasks)


def answer_of(
    model: nn.Module,
    labels: LabelSpace | None,
    task: str,
    classes: LabelSpace | None,
    *,
    joint: str = "softmax",
) -> Answer | None:
    """Return how a network answers a task, or ``None`` where it cannot.

    A network with several heads answers with the head of the task's name, else with the only head
    that has the task's classes, else with all heads together.

    Args:
        model: the network.
        labels: the classes of its outputs, for one that has a single head.
        task: name of the task.
        classes: the task's classes.
        joint: how the scores of several heads are compared: ``softmax`` or ``raw``.
    """
    if isinstance(model, MultiTaskNetwork):
        options = [(name, model.labels[name], model.for_task(name)) for name in model.tasks]
    elif isinstance(model, Ensemble):
        options = [
            (model.tasks[name], model.labels[name], network)
            for name, network in zip(model.names, model.networks, strict=True)
        ]
    else:
        return Answer((model,), "one", labels)
    named = [(space, net) for name, space, net in options if name == task and _fits(space, classes)]
    knowing = named or [
        (space, net)
        for _, space, net in options
        if space is not None and classes is not None and space.covers(classes)
    ]
    alike = len({id(net) for _, net in knowing}) == 1
    if knowing and (alike or isinstance(model, Ensemble)):
        space = knowing[0][0]
        if not isinstance(model, Ensemble):
            return Answer((knowing[0][1],), "one", space)
        # Members of an ensemble are averaged class by class, so they must list the same classes.
        same = [n for s, n in knowing if s is space or (s and space and s.equals(space))]
        return Answer(tuple(same), "mean", space) if len(same) > 1 else None  # else no ensemble
    if knowing:
        log.info("Several heads know the classes of task '%s' and none has its name", task)
        return None
    together = joint_answer(model, joint)
    if together is None or together.space is None or classes is None:
        return None
    return together if together.space.covers(classes) else None


def joint_answer(model: nn.Module, rule: str) -> Answer | None:
    """Return the answer over the classes of all heads together; ``None`` where classes overlap."""
    if isinstance(model, MultiTaskNetwork):
        found = [(model.labels[task], model.for_task(task)) for task in model.tasks]
    elif isinstance(model, Ensemble):
        found = list(zip(model.labels.values(), model.networks, strict=True))
    else:
        return None
    spaces = [space for space, _ in found if space is not None]
    space = joint_space(spaces) if len(spaces) == len(found) else None
    return None if space is None else Answer(tuple(net for _, net in found), rule, space)


def _fits(space: LabelSpace | None, classes: LabelSpace | None) -> bool:
    return space is None or classes is None or space.covers(classes)
