"""Fingerprints of everything that determines a network's weights, as text and as a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.target import is_target, locate

_PATHS = ("root", "path", "folder", "file", "data_dir")  # options that name a place by convention


def canonical(value: Any) -> Any:
    """Return ``value`` as JSON types, the same for equal values whatever their order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): canonical(value[key]) for key in value}
    if isinstance(value, list | tuple | range):
        return [canonical(item) for item in value]
    if isinstance(value, torch.dtype | Path):
        return str(value)
    return value


def canonical_text(value: Any) -> str:
    """Return ``value`` as JSON, the same text for equal values whatever their order."""
    return json.dumps(canonical(value), sort_keys=True, default=repr)


def data_fingerprint(spec: Mapping[str, Any]) -> Any:
    """Return everything that determines the data of a ``_target_`` mapping, as JSON types.

    In addition to the options themselves these are the absolute path of every folder or file that
    they name, with names, sizes and times of the files there, so that different images under the
    same name count as different data, and the source code of a target that is not part of this
    package. A target that downloads missing files (``download=True``) is responsible for their
    content.

    Args:
        spec: the mapping, with further ones nested in its options.
    """
    found = canonical(spec)
    if not is_target(spec):
        return found
    target = locate(str(spec["_target_"]))
    parameters = _parameters(target)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    downloads = bool({**defaults, **spec}.get("download", False))
    for option, value in spec.items():
        if isinstance(value, Mapping):
            found[option] = data_fingerprint(value)
        elif isinstance(value, list | tuple):
            found[option] = [
                data_fingerprint(item) if isinstance(item, Mapping) else canonical(item)
                for item in value
            ]
        elif isinstance(value, str | Path) and _is_path(option, parameters.get(option)):
            place = Path(value).expanduser().resolve()
            found[option] = str(place) if downloads else [str(place), listing(place)]
    if code := _foreign_code(target):
        found["_code_"] = code
    return found


def listing(place: Path) -> str | None:
    """Return a hash of names, sizes and times of all files at ``place``; ``None`` for nothing."""
    if not place.exists():
        return None
    digest = hashlib.sha256()
    alone: list[tuple[str, list[str], list[str]]] = [(str(place.parent), [], [place.name])]
    for folder, _, names in alone if place.is_file() else sorted(os.walk(place)):
        for name in sorted(names):
            file = os.path.join(folder, name)  # noqa: PTH118 - 50,000 files: Path costs a second
            state = os.stat(file)  # noqa: PTH116
            inside = os.path.relpath(file, place)
            digest.update(f"{inside}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes, whatever the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except ValueError:  # some builtins show no signature
        return {}


def _is_path(option: str, parameter: inspect.Parameter | None) -> bool:
    annotation = "" if parameter is None else str(parameter.annotation)
    return option in _PATHS or "Path" in annotation


def _foreign_code(target: Callable[..., Any]) -> str | None:
    """Return a hash of the file that defines ``target``; ``None`` for this package's own."""
    if target.__module__.partition(".")[0] == "fusion":
        return None
    try:
        file = inspect.getsourcefile(target)
    except TypeError:  # a builtin
        return None
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
