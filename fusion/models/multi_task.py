"""One body with a head for each of several tasks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError, suggestion
from fusion.labels import LabelSpace
from fusion.models.cut import CutNetwork
from fusion.models.head_rows import resize_head
from fusion.weights import load_tensors, tensors_of


class MultiTaskNetwork(nn.Module):
    """A network of several tasks that share everything except the tensors of single tasks.

    Each task has a whole network of the original class, whose shared modules and parameters are the
    same objects in all of them. Each task has its own head and, if requested, its own running
    statistics of batch norm.

    Args:
        networks: task → network; what is shared is shared by identity (:meth:`assemble` makes
            such networks).
        labels: task → the classes of its outputs; ``None`` where they are unknown.

    Raises:
        UserError: no task.

    Example::

        >>> import torch
        >>> from fusion.models import CifarResNet
        >>> body, digits = CifarResNet(8, num_classes=10), CifarResNet(8, num_classes=2)
        >>> keys = ("linear.weight", "linear.bias")
        >>> own = {"digits": {key: digits.state_dict()[key] for key in keys}}
        >>> own["images"] = {key: body.state_dict()[key] for key in keys}
        >>> model = MultiTaskNetwork.assemble(body, own).eval()
        >>> model(torch.zeros(1, 3, 32, 32), task="digits").shape
        torch.Size([1, 2])
        >>> type(model.for_task("images")).__name__
        'CifarResNet'
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        labels: Mapping[str, LabelSpace | None] | None = None,
    ) -> None:
        super().__init__()
        if not networks:
            raise UserError("a network of several tasks has none; give at least one")
        self._tasks = tuple(networks)
        self.networks = nn.ModuleList(networks.values())
        self.labels = {task: (labels or {}).get(task) for task in self._tasks}

    @classmethod
    def assemble(
        cls,
        body: nn.Module,
        own: Mapping[str, Mapping[str, Tensor]],
        labels: Mapping[str, LabelSpace | None] | None = None,
    ) -> MultiTaskNetwork:
        """Return a network made of ``body`` and the tensors of each task.

        Args:
            body: a network of the original class; it is not changed. It provides all tensors that
                are not in ``own``.
            own: task → state-dict keys and tensors of that task alone. Tensors may differ from
                the body's in shape. A mapping listed under two tasks is shared by them.
            labels: task → the classes of its outputs.
        """
        shared = copy.deepcopy(body)
        made: dict[int, nn.Module] = {}
        networks = {}
        for task, state in own.items():
            if id(state) not in made:
                network = _copy_apart_from_shared(shared, state)
                resize_head(network, state)
                load_tensors(network, state)
                made[id(state)] = network
            networks[task] = made[id(state)]
        return cls(networks, labels)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self._tasks

    def forward(self, *inputs: Any, task: str | None = None) -> Any:
        """Return what the network of ``task`` returns for ``inputs``.

        A mapping from tasks to images gives one from tasks to outputs. Modules that all tasks share
        see these images as one batch where possible (see :meth:`outputs`), so that in training mode
        batch norm normalises by the moments of the mixture, as its running statistics do later.

        Raises:
            UserError: there is no such task, or none was named and there are several.
        """
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return self._together(inputs[0])
        if task is None and len(self._tasks) == 1:
            task = self._tasks[0]
        if task is None:
            raise UserError(
                f"the network has a head for each of {', '.join(self._tasks)}; say which: "
                f"model(images, task={self._tasks[0]!r})"
            )
        return self.for_task(task)(*inputs)

    def for_task(self, task: str) -> nn.Module:
        """Return the network of one task, of the original class.

        It shares its body with the other tasks: training it changes theirs. ``copy.deepcopy`` of it
        is independent.

        Raises:
            UserError: there is no such task.
        """
        if task not in self._tasks:
            raise UserError(
                f"the network has no task '{task}'{suggestion(task, self._tasks)} "
                f"(it has {', '.join(self._tasks)})"
            )
        return self.networks[self._tasks.index(task)]

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return the output of each task's network for ``images``.

        Shared modules run once where possible: the trunk of networks that are cut
        (:class:`CutNetwork`), and everything else where tasks differ in the last linear layer alone
        (:meth:`own_layer`).
        """
        if self.has_trunk():
            values = self.networks[0].trunk(images)  # type: ignore[operator]
            return {t: self.for_task(t).tail(values) for t in self._tasks}  # type: ignore[operator]
        layer, first = self.own_layer(), self.networks[0]
        calls: list[tuple[Tensor, Tensor]] = []
        if layer is not None:
            hook = first.get_submodule(layer).register_forward_hook(
                lambda _, inputs, output: calls.append((inputs[0], output))
            )
            try:
                output = first(images)
            finally:
                hook.remove()
        if len(calls) != 1 or calls[0][1] is not output:  # something follows, or it runs twice
            return {task: self.for_task(task)(images) for task in self._tasks}
        assert layer is not None
        heads = {task: self.for_task(task).get_submodule(layer) for task in self._tasks}
        own = first.get_submodule(layer)
        return {task: output if h is own else h(calls[0][0]) for task, h in heads.items()}

    def _together(self, images: Mapping[str, Tensor]) -> dict[str, Any]:
        one_shape = len({batch.shape[1:] for batch in images.values()}) == 1
        has_trunk = self.has_trunk()
        if not one_shape or not (has_trunk or self.own_layer()):
            return {task: self.for_task(task)(batch) for task, batch in images.items()}
        mixture = torch.cat(list(images.values()))
        ends = itertools.accumulate(len(batch) for batch in images.values())
        rows = {
            task: slice(end - len(images[task]), end)
            for task, end in zip(images, ends, strict=True)
        }
        if has_trunk:  # a tail sees the images of its own task alone
            values = self.networks[0].trunk(mixture)  # type: ignore[operator]
            parts = {task: [value[own] for value in values] for task, own in rows.items()}
            return {t: self.for_task(t).tail(part) for t, part in parts.items()}  # type: ignore[operator]
        outputs = self.outputs(mixture)
        return {task: outputs[task][own] for task, own in rows.items()}

    def has_trunk(self) -> bool:
        """Return whether the tasks' networks are cut, and share everything before the cut."""
        first = self.networks[0]
        if not all(isinstance(network, CutNetwork) for network in self.networks):
            return False
        assert isinstance(first, CutNetwork)
        return not set(first.cut.trunk) & set(self.own_keys())

    def own_layer(self) -> str | None:
        """Return the name of the linear layer if the tasks differ in that layer alone."""
        layers = {key.rpartition(".")[0] for key in self.own_keys()}
        if len(layers) != 1:
            return None
        name = layers.pop()
        return name if isinstance(self.networks[0].get_submodule(name), nn.Linear) else None

    def own_keys(self) -> tuple[str, ...]:
        """Return the state-dict keys, within a task's network, of what is not shared by all."""
        states = [
            {
                **dict(network.named_parameters(remove_duplicate=False)),
                **dict(network.named_buffers(remove_duplicate=False)),
            }
            for network in self.networks
        ]
        first = self.networks[0]
        return tuple(
            key
            for key in tensors_of(first)
            if any(state[key] is not states[0][key] for state in states)
        )


def _copy_apart_from_shared(network: nn.Module, own: Collection[str]) -> nn.Module:
    """Return a copy of ``network`` in which only the tensors ``own`` are new objects.

    Modules that hold none of them are reused; others are copied with their shared tensors.
    """
    memo: dict[int, Any] = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if not any(key.startswith(prefix) for key in own):
            memo[id(module)] = module
            continue
        tensors = {**dict(module.named_parameters(recurse=False))}
        tensors |= dict(module.named_buffers(recurse=False))
        memo.update({id(t): t for key, t in tensors.items() if f"{prefix}{key}" not in own})
    return copy.deepcopy(network, memo)
