"""Networks as safetensors files that say how to build them: architecture, classes, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.fingerprint import canonical
from fusion.models import MultiTaskNetwork, resize_head
from fusion.weights import load_safetensors, read_metadata, save_safetensors

ARCHITECTURE = "architecture"  # metadata: mapping with _target_, as JSON
HEAD = "head"  # metadata: state-dict keys whose shape may differ from the architecture's, as JSON
LABELS = "labels"  # metadata: the classes of the outputs
TASKS = "tasks"  # metadata: task -> its classes or null, as JSON; only of several tasks
_OWN = "tasks"  # first part of the key of a tensor that belongs to one task
_NO_DOWNLOAD = {"weights": None, "weights_backbone": None, "pretrained": False}


def save_network(
    path: str | Path,
    model: nn.Module,
    *,
    architecture: Mapping[str, Any] | None = None,
    head: tuple[str, ...] = (),
    labels: LabelSpace | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network to ``path`` as safetensors, whole or not at all.

    Of a `MultiTaskNetwork` the shared tensors stand under their plain names, what belongs to one
    task under ``tasks.<task>.<name>``.

    Args:
        path: the file.
        model: the network.
        architecture: the mapping with ``_target_`` that builds it, where one is known.
        head: state-dict keys whose shape may differ from the architecture's.
        labels: the classes of its outputs; a `MultiTaskNetwork` knows its own.
        metadata: further strings to keep.

    Raises:
        UserError: a tensor has entries that are NaN or infinite.
    """
    notes = dict(metadata or {})
    if architecture is not None:
        notes[ARCHITECTURE] = json.dumps(portable(architecture), sort_keys=True)
        notes[HEAD] = json.dumps(list(head))
    if isinstance(model, MultiTaskNetwork):
        spaces = {task: space and space.to_json() for task, space in model.labels.items()}
        notes[TASKS] = json.dumps(spaces)
    elif labels is not None:
        notes[LABELS] = labels.to_json()
    tensors = file_tensors(model)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"'{key}' has entries that are NaN or infinite, so '{path}' was not written; "
                f"lower the scale or the learning rate"
            )
    save_safetensors(path, tensors, notes)


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network under the names that they have in a file."""
    if not isinstance(model, MultiTaskNetwork):
        return dict(model.state_dict())
    own = set(model.own_keys())
    states = {task: model.for_task(task).state_dict() for task in model.tasks}
    first = next(iter(states.values()))
    tensors = {key: tensor for key, tensor in first.items() if key not in own}
    for task, state in states.items():
        tensors |= {f"{_OWN}.{task}.{key}": state[key] for key in state if key in own}
    return tensors


def task_tensors(
    tensors: Mapping[str, Tensor], tasks: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return a file's tensors apart: what is shared, and task → what belongs to it alone.

    Tasks that share what they have for themselves share one mapping.
    """
    own: dict[str, dict[str, Tensor]] = {}
    shared = dict(tensors)
    for task in sorted(tasks, key=len, reverse=True):  # "a.b" before "a"
        prefix = f"{_OWN}.{task}."
        inside = [key for key in shared if key.startswith(prefix)]
        own[task] = {key.removeprefix(prefix): shared.pop(key) for key in inside}
    result: dict[str, dict[str, Tensor]] = {}
    for task in tasks:
        twin = next((t for t in result if _same_tensors(result[t], own[task])), None)
        result[task] = own[task] if twin is None else result[twin]
    return shared, result


def read_tasks(path: str | Path) -> dict[str, LabelSpace | None] | None:
    """Return the tasks of a file and their classes; ``None`` for a file of one network.

    Raises:
        UserError: the file is not one that this package wrote.
    """
    written = read_metadata(path).get(TASKS)
    if written is None:
        return None
    try:
        found = json.loads(written)
    except ValueError as error:
        raise UserError(f"'{path}': its list of tasks is not JSON; write the file again") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"'{path}': its list of tasks is no mapping; write the file again")
    return {task: None if text is None else LabelSpace.from_json(text) for task, text in found.items()}


def fill_network(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill a bare architecture with a file's tensors; return it, or a network of several tasks.

    Args:
        path: a file that this package wrote.
        model: the architecture that the file names; it is changed.

    Raises:
        UserError: the file does not fit the architecture.
    """
    tensors = load_safetensors(path)
    tasks = read_tasks(path)
    free = set(json.loads(read_metadata(path).get(HEAD, "[]")))
    shared, own = task_tensors(tensors, tasks or {})
    resize_head(model, {key: tensor for key, tensor in shared.items() if key in free})
    expected = model.state_dict()
    given = set(shared).union(*own.values())
    wrong = [key for key in expected if key not in given] + [k for k in given if k not in expected]
    wrong += [k for k in shared if k in expected and shared[k].shape != expected[k].shape]
    if wrong:
        raise UserError(
            f"'{path}' does not fit the architecture: {wrong[0]} and {len(wrong) - 1} more tensors "
            f"are missing, unknown or of another shape"
        )
    if tasks is None:
        model.load_state_dict(shared)
        return model
    for key, tensor in shared.items():
        expected[key].copy_(tensor)
    return MultiTaskNetwork.assemble(model, own, tasks)


def portable(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with ``_target_`` that builds the bare architecture and downloads nothing."""
    spec: dict[str, Any] = canonical(architecture)
    return {
        key: _NO_DOWNLOAD.get(key, value) if key in _NO_DOWNLOAD else value
        for key, value in spec.items()
    }


def _same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k] is second[k] for k in first)
