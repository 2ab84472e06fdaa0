"""Read the description of a network in a safetensors file: architecture, head, classes, tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.network_file import ARCHITECTURE, CUT, HEAD, LABELS, TASKS
from fusion.modelpool.trusted import require_trusted
from fusion.weights import read_metadata


def written_architecture(path: Path, *, trusted: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the mapping with ``_target_`` in a file's metadata, or None where there is none.

    Raises:
        UserError: it is not on the list of :func:`fusion.modelpool.trusted.require_trusted`.
    """
    text = read_metadata(path).get(ARCHITECTURE)
    if text is None:
        return None
    spec = _parsed(text, path=path, what=ARCHITECTURE)
    return require_trusted(spec, path=path, size=path.stat().st_size, trusted=trusted)


def written_labels(path: Path) -> LabelSpace | None:
    """Return the classes of the outputs in a file's metadata, or None.

    Raises:
        UserError: they are written in another way than this package's.
    """
    text = read_metadata(path).get(LABELS)
    return None if text is None else _labels(text, path)


def written_head(path: Path) -> tuple[str, ...]:
    """Return the tensors whose shape is the file's own and not the architecture's.

    Raises:
        UserError: they are written in another way than this package's.
    """
    text = read_metadata(path).get(HEAD)
    names = [] if text is None else _parsed(text, path=path, what=HEAD)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"'{path}' is damaged: its {HEAD} is no list of names; write it again")
    return tuple(names)


def written_tasks(path: Path) -> dict[str, LabelSpace | None] | None:
    """Return task → its classes of a file with several heads; ``None`` for one of one network.

    Raises:
        UserError: they are written in another way than this package's.
    """
    text = read_metadata(path).get(TASKS)
    if text is None:
        return None
    found = _parsed(text, path=path, what=TASKS)
    texts = found.values() if isinstance(found, dict) else ()
    if not texts or not all(isinstance(entry, str | None) for entry in texts):
        raise UserError(f"'{path}' is damaged: its {TASKS} name no tasks; write it again")
    return {task: None if text is None else _labels(text, path) for task, text in found.items()}


def written_cut(path: Path) -> tuple[str, bool] | None:
    """Return the layer before which a file's network is cut, and whether the readout is a matrix.

    Returns:
        ``None`` for a network that is not cut.

    Raises:
        UserError: it is written in another way than this package's.
    """
    text = read_metadata(path).get(CUT)
    if text is None:
        return None
    found = _parsed(text, path=path, what=CUT)
    layer, dense = (found.get(k) if isinstance(found, dict) else None for k in ("layer", "dense"))
    if not isinstance(layer, str) or not isinstance(dense, bool):
        raise UserError(f"'{path}' is damaged: its {CUT} names no layer; write it again")
    return layer, dense


def _labels(text: str, path: Path) -> LabelSpace:
    try:
        return LabelSpace.from_json(text)
    except UserError as error:
        raise UserError(f"'{path}' is damaged: {error}; write it again") from error


def _parsed(text: str, *, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        raise UserError(f"'{path}' is damaged: its {what} is not JSON; write it again") from error
