"""Assemble a network from merged tensors, heads and running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fusion.merging.batch_norm import (
    Calibration,
    recalibrate,
    recalibrate_tasks,
    repair_mean,
    statistics_keys,
)
from fusion.merging.gram_statistics import statistics_from_grams
from fusion.merging.heads import HeadPlan, merged_heads, task_labels
from fusion.merging.members import LayerChoice, Members, choice_of
from fusion.merging.statistics import Statistics
from fusion.merging.tensors import merge_statistics
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork, resize_head
from fusion.weights import load_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True, eq=False)
class Assembly:
    """Factory of a pool's networks: the merged one, and its controls under the same treatment.

    Attributes:
        members: base and experts.
        choice: the merged layers, whose running statistics are merged too if requested.
        plan: the plan of the heads.
        treatment: of the running statistics.
        modelpool: has the images.
        fabric: where to compute.
        calibration: the sample of images.
        weights: of the experts in the mean, for REPAIR.
        measured: ``gram`` and ``moments`` of the experts, for a treatment of ``grams``.
        joint: the head of a ``joint`` plan.
    """

    members: Members
    choice: LayerChoice
    plan: HeadPlan
    treatment: str
    modelpool: BaseModelPool
    fabric: Fabric
    calibration: Calibration
    weights: tuple[float, ...]
    measured: Statistics | None = None
    joint: Mapping[str, Tensor] | None = None

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Return the heads, according to the plan, that are not ordinary layers."""
        members = self.members
        return merged_heads(
            self.plan, members.head, members.base, members.experts, self.modelpool, self.joint
        )

    def network(
        self,
        state: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
        own: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> nn.Module:
        """Return a network, or one with several heads.

        Args:
            state: tensors shared by all tasks; missing ones are taken from the base.
            heads: task → head, or ``""`` → the only head; missing ones are taken from the base.
            own: task → further parameters of that task alone.
        """
        return self.filled(self.members.body(), state, heads, own)

    def filled(
        self,
        body: nn.Module,
        state: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
        own: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> nn.Module:
        """Return the same as :meth:`network`, built from ``body``, which is changed.

        Args:
            body: source of missing tensors; if it is on the meta device, so is the result.
            state, heads, own: see :meth:`network`.
        """
        # A rule on folded batch norm has decided about the running statistics there.
        state = self.statistics() | dict(state)
        state |= heads.get("", {})
        resize_head(body, state)
        load_tensors(body, state)
        if self.treatment == "recalibrate" and not own:
            recalibrate(body, self.modelpool, self.fabric, self.calibration)
        elif self.treatment == "repair":
            self._repair(body)
        elif self.treatment == "grams" and not own:
            self._load_statistics(body, self.choice)
        by_task = {task: head for task, head in heads.items() if task}
        if by_task or own or self.treatment == "recalibrate_per_task":
            return self._with_tasks(body, by_task, own or {})
        return body

    def statistics(self) -> dict[str, Tensor]:
        """Return the running statistics computed from the experts', where they are merged."""
        if self.treatment not in ("merge", "interpolate"):
            return {}
        return merge_statistics(self.members, self.choice, self.treatment)

    def _repair(self, body: nn.Module) -> None:
        experts = []
        for name in self.members.names:
            expert = self.modelpool.load_model(name)
            load_tensors(expert, self.members.experts[name])
            experts.append(expert)
        repair_mean(
            body, experts, self.modelpool, self.fabric, self.calibration, weights=self.weights
        )

    def _load_statistics(self, network: nn.Module, choice: LayerChoice) -> None:
        """Set the running statistics of a network from the experts' Gram matrices."""
        assert self.measured is not None
        found = statistics_from_grams(self.members, choice, network, self.measured)
        load_tensors(network, found)

    def _with_tasks(
        self,
        body: nn.Module,
        heads: Mapping[str, Mapping[str, Tensor]],
        own: Mapping[str, Mapping[str, Tensor]],
    ) -> MultiTaskNetwork:
        """Return a network with the tensors of each task alone."""
        tasks = self.modelpool.tasks
        # Networks that differ in more than their head have separate running statistics.
        apart = bool(own) or self.treatment == "recalibrate_per_task"
        statistics = _statistics(body) if apart else {}
        parts: dict[str, Mapping[str, Tensor]] = {}
        for task in tasks:
            if apart:
                copies = {key: tensor.clone() for key, tensor in statistics.items()}
                parts[task] = {**copies, **own.get(task, {}), **heads.get(task, {})}
            else:
                parts[task] = heads[task]  # tasks that share a head share one mapping
        network = MultiTaskNetwork.assemble(body, parts, task_labels(self.plan, self.modelpool))
        if self.treatment == "grams" and own:
            for task, names in tasks.items():
                of_task = choice_of(self.choice, self.members.names, names)
                self._load_statistics(network.for_task(task), of_task)
        if self.treatment in ("recalibrate", "recalibrate_per_task"):
            head = self.members.head
            norms = [m.rpartition(".")[0] for m, _ in statistics_keys(body) if apart or m in head]
            recalibrate_tasks(network, self.modelpool, self.fabric, self.calibration, norms)
        return network


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of all norms, with their counters of batches."""
    state = model.state_dict()
    keys = [key for pair in statistics_keys(model) for key in pair]
    counters = [f"{key.rpartition('.')[0]}.num_batches_tracked" for key in keys[::2]]
    return {key: state[key] for key in [*keys, *counters] if key in state}
