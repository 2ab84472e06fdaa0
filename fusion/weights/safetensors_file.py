"""Checkpoints in the safetensors format: written whole, read tensor by tensor or piece by piece.

Pieces are read with plain file reads rather than through a memory map, since the pages of a map
count as this process's memory for as long as it is open.

The format has no shared storage. A tensor that is saved under several names is written
once, and the other names are noted in the metadata under ``TIED``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion.errors import UserError
from fusion.files import atomic_path
from fusion.weights.safetensors_header import (
    TIED,
    checked_notes,
    damaged,
    read_header,
    sort_metadata,
)
from fusion.weights.source import TensorInfo, TensorSource


class SafetensorsSource(TensorSource):
    """The tensors of a safetensors file; only the header is read until a tensor is accessed.

    Tied tensors are listed under each of their names.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.metadata = dict(header.metadata)
        self.tied = _tied_names(self.path, self.metadata.pop(TIED, "{}"), header.infos)
        self._infos = dict(header.infos)
        self._starts = dict(header.starts)
        for name, kept in self.tied.items():
            self._infos[name] = self._infos[kept]
            self._starts[name] = self._starts[kept]

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the tensor ``name`` from the header."""
        return self._infos[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of the tensor ``name`` from the file, as a new vector in C order."""
        info = self._infos[name]
        part = torch.empty(max(min(stop, info.numel) - start, 0), dtype=info.dtype)
        self._fill(part, name, start)
        return part

    def read_into(self, part: Tensor, name: str, start: int) -> None:
        """Read elements of the tensor ``name`` from the file into ``part``."""
        if part.dtype == self._infos[name].dtype and part.device.type == "cpu":
            self._fill(part, name, start)
        else:
            super().read_into(part, name, start)

    def _fill(self, part: Tensor, name: str, start: int) -> None:
        info = self._infos[name]
        target = part.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[name] + start * info.dtype.itemsize)
            while target:
                count = file.readinto(target)
                if not count:
                    raise damaged(self.path, f"it ends within '{name}'")
                target = target[count:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path``, whole or not at all.

    Names of one and the same tensor (equal storage, shape and strides) are written once and tied
    again by ``load_safetensors``. Other views into a common storage are written as separate
    tensors. Every tensor is written in C order: a channels-last tensor is restored with the same
    values, contiguous. The file orders the names in its own way; equal input gives equal bytes.

    Args:
        path: the file; its folder is created if necessary.
        tensors: state-dict keys and tensors, on any device.
        metadata: strings to keep with them, such as the architecture.

    Raises:
        UserError: a metadata value is not a string, or has the reserved key ``TIED``.

    Example::

        >>> import tempfile
        >>> import torch
        >>> from fusion.weights import load_safetensors, save_safetensors
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> save_safetensors(path, {"w": torch.ones(2)}, {"note": "ones"})
        >>> load_safetensors(path)
        {'w': tensor([1., 1.])}
        >>> folder.cleanup()
    """
    notes = checked_notes(path, metadata)
    tensors = dict(tensors)  # a lazy mapping is read once; every tensor keeps a distinct address
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UserError(f"'{name}' lies on the meta device and has no values to save in {path}")
        identity = _identity(tensor) if tensor.numel() else (name,)
        if identity in first_name:
            tied[name] = first_name[identity]
            continue
        first_name[identity] = name
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in written:
            plain = plain.clone()  # the writer refuses views and shared memory
        written.add(plain.untyped_storage().data_ptr())
        kept[name] = plain
    if tied:
        notes[TIED] = json.dumps(tied)
    with atomic_path(path) as temporary:
        save_file(kept, temporary, metadata=notes)
        sort_metadata(temporary)


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of ``path`` into memory; names that were tied share one tensor again.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.

    Example::

        >>> import tempfile
        >>> import torch
        >>> from fusion.weights import load_safetensors, save_safetensors
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> shared = torch.ones(2)
        >>> save_safetensors(path, {"a": shared, "b": shared})
        >>> found = load_safetensors(path)
        >>> found["a"] is found["b"]
        True
        >>> folder.cleanup()
    """
    source = SafetensorsSource(path)
    tensors: dict[str, Tensor] = {}
    for name in source:  # tied names come after the ones they are tied to
        kept = source.tied.get(name)
        tensors[name] = tensors[kept] if kept is not None else source[name]
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the strings that ``save_safetensors`` kept with the tensors of ``path``.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.

    Example::

        >>> import tempfile
        >>> import torch
        >>> from fusion.weights import read_metadata, save_safetensors
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> save_safetensors(path, {"w": torch.ones(2)}, {"note": "ones"})
        >>> read_metadata(path)
        {'note': 'ones'}
        >>> folder.cleanup()
    """
    return SafetensorsSource(path).metadata


def map_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of ``path`` mapped into memory; tied names share one tensor.

    A page of the file is read when it is first used, and copied when it is first written to: the
    file never changes. It may be renamed or unlinked meanwhile, but must not be overwritten.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.

    Example::

        >>> import tempfile
        >>> import torch
        >>> from fusion.weights import map_safetensors, save_safetensors
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> save_safetensors(path, {"w": torch.ones(2)})
        >>> map_safetensors(path)
        {'w': tensor([1., 1.])}
        >>> folder.cleanup()
    """
    tied = SafetensorsSource(path).tied
    tensors = load_file(path)
    return tensors | {name: tensors[kept] for name, kept in tied.items()}


def _tied_names(path: Path, text: str, stored: Mapping[str, object]) -> dict[str, str]:
    """Return the further names of stored tensors that the metadata ``TIED`` list."""
    try:
        tied = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        raise damaged(path, f"its metadata '{TIED}' is not JSON") from error
    if not isinstance(tied, dict):
        raise damaged(path, f"its metadata '{TIED}' is not a JSON object")
    for name, kept in tied.items():
        known = isinstance(kept, str) and kept in stored and name not in stored
        if not known or not _is_unicode(name):
            raise damaged(path, f"its metadata '{TIED}' ties names to tensors that are not there")
    return tied


def _is_unicode(text: str) -> bool:
    """Whether ``text`` has no half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """The identity that two names of the same tensor have in common."""
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )
