"""Assemble a network of several tasks from the tensors of one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fusion.errors import UserError, shown
from fusion.labels import LabelSpace
from fusion.modelpool.network_file import OWN
from fusion.models import MultiTaskNetwork
from fusion.weights import SafetensorsSource, tensors_of


def assemble_tasks(
    path: Path,
    body: nn.Module,
    tensors: Mapping[str, Tensor],
    tasks: Mapping[str, LabelSpace | None],
) -> MultiTaskNetwork:
    """Return the network of several tasks that a file holds.

    Args:
        path: the file.
        body: the architecture; it is changed.
        tensors: the file's tensors, or tensors of their shapes on the meta device.
        tasks: task → its classes.

    Raises:
        UserError: the tensors do not fit the architecture.
    """
    shared, own = _apart(path, tensors, tasks)
    expected = tensors_of(body)
    for task, state in own.items():
        missing = [key for key in expected if key not in shared and key not in state]
        odd = [key for key in (*shared, *state) if key not in expected]
        odd += [key for key in shared if key in expected and _unlike(shared[key], expected[key])]
        if missing or odd:
            first = shown((missing or odd)[0])
            raise UserError(
                f"'{path}' does not fit the architecture: for the task '{shown(task)}', "
                f"{len(missing)} tensors are missing and {len(odd)} do not fit; the first: {first}"
            )
    for key, tensor in shared.items():
        expected[key].copy_(tensor)
    return MultiTaskNetwork.assemble(body, own, tasks)


def _unlike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape != other.shape or tensor.is_floating_point() != other.is_floating_point()


def _apart(
    path: Path, tensors: Mapping[str, Tensor], tasks: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the shared tensors, and task → tensors of that task alone.

    Tasks whose own tensors are tied in the file share one mapping.
    """
    tied = SafetensorsSource(path).tied
    shared = dict(tensors)
    own: dict[str, dict[str, Tensor]] = {}
    places: dict[str, frozenset[tuple[str, str]]] = {}
    for task in sorted(tasks, key=len, reverse=True):  # "a.b" before "a"
        prefix = f"{OWN}.{task}."
        inside = [key for key in shared if key.startswith(prefix)]
        places[task] = frozenset((key.removeprefix(prefix), tied.get(key, key)) for key in inside)
        own[task] = {key.removeprefix(prefix): shared.pop(key) for key in inside}
    first = {place: task for task, place in reversed(places.items())}
    return shared, {task: own[first[places[task]]] for task in tasks}
