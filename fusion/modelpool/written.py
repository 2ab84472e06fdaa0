"""What a safetensors file says of its network: the architecture and the classes, as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.modelpool.trusted import require_trusted
from fusion.weights import read_metadata


def written_architecture(path: Path, *, trusted: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the mapping with ``_target_`` in a file's metadata, or None where there is none.

    Raises:
        UserError: it is not on the list of :func:`fusion.modelpool.trusted.require_trusted`.
    """
    text = read_metadata(path).get("architecture")
    if text is None:
        return None
    spec = _parsed(text, path=path, what="architecture")
    return require_trusted(spec, path=path, size=path.stat().st_size, trusted=trusted)


def written_classes(path: Path) -> tuple[int, ...] | None:
    """Return the original labels of the outputs in a file's metadata, or None.

    Raises:
        UserError: they are no list of integers.
    """
    text = read_metadata(path).get("classes")
    if text is None:
        return None
    labels = _parsed(text, path=path, what="classes")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"'{path}' is damaged: its classes are no list of integers; write it again")
    return tuple(labels)


def _parsed(text: str, *, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        raise UserError(f"'{path}' is damaged: its {what} is not JSON; write it again") from error
