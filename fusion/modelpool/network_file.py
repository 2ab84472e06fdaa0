"""Write a network as a safetensors file that says how to build it: architecture, classes, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.bare import without_pretrained_weights
from fusion.modelpool.fingerprint import canonical
from fusion.models import MultiTaskNetwork
from fusion.weights import save_safetensors, tensors_of

ARCHITECTURE = "architecture"  # metadata: mapping with _target_, as JSON
HEAD = "head"  # metadata: state-dict keys whose shape may differ from the architecture's, as JSON
LABELS = "labels"  # metadata: the classes of the outputs
TASKS = "tasks"  # metadata: task -> its classes or null, as JSON; only of several tasks
OWN = "tasks"  # first part of the key of a tensor that belongs to one task


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
        bare = canonical(without_pretrained_weights(architecture))
        notes[ARCHITECTURE] = json.dumps(bare, sort_keys=True)
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
        return tensors_of(model)
    own = set(model.own_keys())
    states = {task: tensors_of(model.for_task(task)) for task in model.tasks}
    first = next(iter(states.values()))
    tensors = {key: tensor for key, tensor in first.items() if key not in own}
    for task, state in states.items():
        tensors |= {f"{OWN}.{task}.{key}": state[key] for key in state if key in own}
    return tensors
