"""Build each data set once, however many parts of a run name it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from fusion.data.preprocessing import Preprocessing
from fusion.target import build, is_target, locate

_BUILT: WeakValueDictionary[str, Any] = WeakValueDictionary()


def load_dataset(spec: Mapping[str, Any], preprocessing: Preprocessing | None = None) -> Any:
    """Return the data set that a ``_target_`` mapping builds.

    A second call with an equal mapping returns the same object for as long as a reference to it
    exists: a member's recipe, the pool and the tasks often name one data set.

    Args:
        spec: the mapping.
        preprocessing: preprocessing that a network's weights expect; passed on to targets that take
            ``preprocessing`` and whose mapping does not give it.

    Raises:
        UserError: the data set cannot be built.
    """
    if preprocessing is not None:
        spec = _with_preprocessing(spec, preprocessing)
    key = json.dumps(spec, sort_keys=True, default=repr)
    found = _BUILT.get(key)
    if found is None:
        found = build(spec)
        if hasattr(found, "__weakref__"):
            _BUILT[key] = found
    return found


def _with_preprocessing(spec: Mapping[str, Any], preprocessing: Preprocessing) -> dict[str, Any]:
    """Return ``spec`` with ``preprocessing`` for its target, and for those in its options."""
    found = {
        name: _with_preprocessing(value, preprocessing) if is_target(value) else value
        for name, value in spec.items()
    }
    try:
        parameters = inspect.signature(locate(str(spec["_target_"]))).parameters
    except ValueError:  # some builtins show no signature
        return found
    if "preprocessing" in parameters and found.get("preprocessing") is None:
        found["preprocessing"] = preprocessing
    return found
