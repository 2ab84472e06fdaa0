"""Arguments and results of the operations of a graph: tensors inside tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def flat(values: Any) -> list[Any]:
    """Return everything inside tuples, lists and dicts, in order."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return [part for value in values for part in flat(value)]
    return [values]


def nested(values: Any, change: Callable[[Any], Any], *, of: type = Tensor) -> Any:
    """Apply ``change`` to everything of the type ``of`` inside tuples, lists and dicts."""
    if isinstance(values, of):
        return change(values)
    if isinstance(values, dict):
        return {key: nested(value, change, of=of) for key, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        parts = [nested(value, change, of=of) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
    return values
