"""Instructions of a card to load the network, with this package and without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.files import MODEL
from fusion.modelpool.network_file import ARCHITECTURE, OWN
from fusion.modelpool.written import written_head, written_tasks
from fusion.weights import SafetensorsSource

_OURS = "fusion."


def with_package(path: Path) -> str:
    """Return Python lines that load the file ``path`` with this package."""
    source = SafetensorsSource(path)
    tasks = written_tasks(path)
    architecture = "" if ARCHITECTURE in source.metadata else ", architecture"
    lines = ["import fusion", "", f'model = fusion.load("{MODEL}"{architecture})']
    if tasks:
        lines.append(f"logits = model(images, task={next(iter(tasks))!r})  # one of model.tasks")
    else:
        lines.append("logits = model(images)")
    return "\n".join(lines)


def without_package(path: Path) -> str | None:
    """Return Python lines that load the file ``path`` with its own architecture alone.

    Returns:
        the lines; None where the architecture is unknown, is this package's own, or cannot be
        written as one call.
    """
    source = SafetensorsSource(path)
    spec = _architecture(source.metadata)
    if spec is None or source.tied or str(spec["_target_"]).startswith(_OURS):
        return None
    module, _, name = str(spec.pop("_target_")).rpartition(".")
    lines = ["from safetensors.torch import load_file", f"from {module} import {name}", ""]
    state = f'load_file("{MODEL}")'
    own = ""
    if tasks := written_tasks(path):
        task = next(iter(tasks))
        own = f"{OWN}.{task}."
        lines += [
            f'state = load_file("{MODEL}")',
            f"own = {own!r}  # a task's tensors; what has no such prefix is shared",
            f'shared = {{k: v for k, v in state.items() if not k.startswith("{OWN}.")}}',
            "head = {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}",
        ]
        state = "shared | head"
    sizes = {source.info(own + key).shape[0] for key in written_head(path) if own + key in source}
    if "num_classes" in spec and len(sizes) == 1:
        spec["num_classes"] = sizes.pop()
    options = ", ".join(f"{key}={value!r}" for key, value in spec.items())
    return "\n".join([*lines, f"model = {name}({options})", f"model.load_state_dict({state})"])


def architecture_name(path: Path) -> str | None:
    """Return the import path of the constructor of the network in ``path``, if the file has it."""
    spec = _architecture(SafetensorsSource(path).metadata, plain=False)
    return None if spec is None else str(spec["_target_"])


def _architecture(metadata: Mapping[str, str], *, plain: bool = True) -> dict[str, Any] | None:
    """Return the mapping that builds the network; only if its options are ``plain`` values."""
    spec = json.loads(metadata.get(ARCHITECTURE, "null"))
    if not isinstance(spec, dict) or "_target_" not in spec:
        return None
    simple = all(
        isinstance(value, str | int | float | bool | list | None) and name.isidentifier()
        for name, value in spec.items()
    )
    others = [name for name in spec if name.startswith("_") and name != "_target_"]
    return spec if not plain or (simple and not others) else None
