"""Statistics on disk: one folder per expert, complete or absent, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.weights import (
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    save_safetensors,
)
from fusion.weights.triangles import from_triangle, to_triangle

log = logging.getLogger(__name__)

INDEX = "index.json"
_VALUES = "values"  # name of the tensor in each file


class StoredStatistics(TensorSource):
    """The statistics of one expert in a folder, each read on access.

    Names are ``<statistic>/<state-dict key>``. Symmetric matrices are stored as upper triangles.

    Args:
        folder: their folder.
        entries: their entries in the index.
    """

    def __init__(self, folder: Path, entries: Iterable[dict[str, Any]]) -> None:
        self._folder = folder
        self._entries = {entry["name"]: entry for entry in entries}

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a statistic, without reading it."""
        return TensorInfo(tuple(self._entries[name]["shape"]), torch.float64)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a part of a statistic as a vector in C order; a matrix is read whole for it."""
        if self._entries[name]["symmetric"]:
            return self[name].flatten()[start:stop]
        return self._source(name).read(_VALUES, start, stop)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        values = self._source(name)[_VALUES]
        if not entry["symmetric"]:
            return values
        return from_triangle(values, entry["shape"][-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _source(self, name: str) -> SafetensorsSource:
        return SafetensorsSource(self._folder / self._entries[name]["file"])


def write_statistics(folder: Path, recipe: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write statistics to ``folder``, which appears whole or not at all.

    The caller holds the folder's lock. Previous content, and files of a killed process next to it,
    are removed.

    Args:
        folder: where they go.
        recipe: everything that determines them.
        tensors: names and float64 tensors on any device; taken, written and let go one by one.
    """
    for leftover in folder.parent.glob(f".{folder.name}*"):
        shutil.rmtree(leftover)
    working = folder.with_name(f".{folder.name}")
    working.mkdir(parents=True)
    try:
        entries = []
        for number, (name, tensor) in enumerate(tensors):
            symmetric = tensor.ndim == 3 and torch.equal(tensor, tensor.mT)
            values = to_triangle(tensor) if symmetric else tensor
            file = f"{number}.safetensors"
            save_safetensors(working / file, {_VALUES: values.cpu()})
            entries.append(
                {
                    "name": name,
                    "shape": list(tensor.shape),
                    "symmetric": symmetric,
                    "file": file,
                    "sha256": _digest(working / file),
                }
            )
        index = {"recipe": recipe, "entries": entries, "sha256": _digest_of(entries)}
        (working / INDEX).write_text(json.dumps(index), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        working.rename(folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def read_statistics(folder: Path, recipe: str) -> StoredStatistics | None:
    """Return the statistics in ``folder``, or ``None`` where there are none of this recipe.

    Every file is compared with its checksum; a damaged folder counts as none, with a warning.
    """
    if not folder.exists():
        return None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        whole = (
            index["recipe"] == recipe
            and index["sha256"] == _digest_of(index["entries"])
            and all(_digest(folder / e["file"]) == e["sha256"] for e in index["entries"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s is damaged; gathering these statistics again", folder)
        return None
    return StoredStatistics(folder, index["entries"])


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest_of(entries: object) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
