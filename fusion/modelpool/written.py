"""What a safetensors file says of its network: the architecture and the classes, as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.network_file import ARCHITECTURE, LABELS
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
    if text is None:
        return None
    _parsed(text, path=path, what=LABELS)
    try:
        return LabelSpace.from_json(text)
    except UserError as error:
        raise UserError(f"'{path}' is damaged: {error}") from error


def _parsed(text: str, *, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        raise UserError(f"'{path}' is damaged: its {what} is not JSON; write it again") from error
