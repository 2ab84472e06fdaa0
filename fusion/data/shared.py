"""Data sets that several parts of a run name are built once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from fusion.target import build

_BUILT: WeakValueDictionary[str, Any] = WeakValueDictionary()


def load_dataset(spec: Mapping[str, Any]) -> Any:
    """Return the data set that a ``_target_`` mapping builds.

    A second call with an equal mapping returns the same object for as long as somebody holds it:
    a member's recipe, the pool and the tasks often name one data set.

    Args:
        spec: the mapping.

    Raises:
        UserError: the data set cannot be built.
    """
    key = json.dumps(spec, sort_keys=True, default=repr)
    found = _BUILT.get(key)
    if found is None:
        found = build(spec)
        if hasattr(found, "__weakref__"):
            _BUILT[key] = found
    return found
