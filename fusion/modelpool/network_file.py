"""Write a network as a safetensors file that describes it: architecture, classes, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.bare import without_pretrained_weights
from fusion.modelpool.fingerprint import canonical
from fusion.models import CutNetwork, MultiTaskNetwork
from fusion.weights import is_finite, save_safetensors, tensors_of

ARCHITECTURE = "architecture"  # metadata: mapping with _target_, as JSON
HEAD = "head"  # metadata: state-dict keys whose shape may differ from the architecture's, as JSON
LABELS = "labels"  # metadata: the classes of the outputs
TASKS = "tasks"  # metadata: task -> its classes or null, as JSON; only of several tasks
CUT = "cut"  # metadata: where the network is cut into trunk and tail, as JSON
OWN = "tasks"  # first part of the key of a tensor that belongs to one task


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of a network, and the name that it has in a file.

    Attributes:
        name: in the file.
        key: state-dict key within the network, or within that of its task.
        task: the task of a tensor of one task; the first task for shared tensors; ``None`` for a
            network without tasks.
        tensor: the parameter or buffer itself: tied ones are one object.
    """

    name: str
    key: str
    task: str | None
    tensor: Tensor


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

    For a `MultiTaskNetwork`, shared tensors are written under their plain names, and those of one
    task under ``tasks.<task>.<name>``.

    Args:
        path: the file.
        model: the network.
        architecture, head, labels, metadata: see :func:`network_metadata`.

    Raises:
        UserError: a tensor has entries that are NaN or infinite.
    """
    notes = network_metadata(
        model, architecture=architecture, head=head, labels=labels, metadata=metadata
    )
    tensors = {entry.name: entry.tensor for entry in file_tensors(model)}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise not_finite(name, path)
    save_safetensors(path, tensors, notes)


def network_metadata(
    model: nn.Module,
    *,
    architecture: Mapping[str, Any] | None = None,
    head: tuple[str, ...] = (),
    labels: LabelSpace | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of a network's file.

    Args:
        model: the network; its values do not matter.
        architecture: the mapping with ``_target_`` that builds it, where one is known.
        head: state-dict keys whose shape may differ from the architecture's.
        labels: the classes of its outputs; a `MultiTaskNetwork` states its own.
        metadata: further strings to store.
    """
    notes = dict(metadata or {})
    if architecture is not None:
        bare = canonical(without_pretrained_weights(architecture))
        notes[ARCHITECTURE] = json.dumps(bare, sort_keys=True)
        notes[HEAD] = json.dumps(list(head))
    one = model.networks[0] if isinstance(model, MultiTaskNetwork) else model
    if isinstance(one, CutNetwork):
        notes[CUT] = json.dumps({"layer": one.cut.layer, "dense": one.dense})
    if isinstance(model, MultiTaskNetwork):
        spaces = {task: space and space.to_json() for task, space in model.labels.items()}
        notes[TASKS] = json.dumps(spaces)
    elif labels is not None:
        notes[LABELS] = labels.to_json()
    return notes


def file_tensors(model: nn.Module) -> list[FileTensor]:
    """Return the tensors of a network under their names in a file."""
    if not isinstance(model, MultiTaskNetwork):
        held = tensors_of(model, keep_vars=True)
        return [FileTensor(key, key, None, tensor) for key, tensor in held.items()]
    own = set(model.own_keys())
    states = {task: tensors_of(model.for_task(task), keep_vars=True) for task in model.tasks}
    first, shared = next(iter(states.items()))
    tensors = [FileTensor(key, key, first, shared[key]) for key in shared if key not in own]
    for task, state in states.items():
        tensors += [FileTensor(f"{OWN}.{task}.{k}", k, task, state[k]) for k in state if k in own]
    return tensors


def not_finite(name: str, path: str | Path) -> UserError:
    """Return the error for a tensor that is not written because it is not finite."""
    return UserError(
        f"'{name}' has entries that are NaN or infinite, so '{path}' was not written; "
        f"lower the scale or the learning rate"
    )
