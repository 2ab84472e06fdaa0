"""Checkpoints in the safetensors format: written whole, read tensor by tensor or piece by piece.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the
header, a JSON header with dtype, shape and place of each tensor, then the little-endian data.
Pieces are read with plain file reads rather than through a memory map, since the pages of a map
count as this process's memory for as long as it is open.

The format does not know shared storage. A tensor that is saved under several names is written
once, and the other names are noted in the metadata under ``TIED``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusion.errors import UserError
from fusion.files import atomic_path
from fusion.weights.source import TensorInfo, TensorSource

TIED = "fusion.tied"  # metadata key: JSON object, name -> the name under which the tensor is kept

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class SafetensorsSource(TensorSource):
    """The tensors of a safetensors file; only the header is read until somebody asks for more.

    Tied tensors stand under each of their names.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header, data_start = _read_header(self.path)
        metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tied: dict[str, str] = json.loads(metadata.pop(TIED, "{}"))
        self.metadata = metadata
        self._infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        end = data_start
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{self.path}: '{name}' has the unknown dtype {entry['dtype']}")
            info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            begin, stop = entry["data_offsets"]
            if stop - begin != info.nbytes:
                raise _damaged(self.path, f"'{name}' does not have the size of its shape")
            self._infos[name] = info
            self._offsets[name] = data_start + begin
            end = max(end, data_start + stop)
        if self.path.stat().st_size != end:
            raise _damaged(
                self.path, f"it has {self.path.stat().st_size:,} bytes instead of {end:,}"
            )
        for name, kept in self.tied.items():
            self._infos[name] = self._infos[kept]
            self._offsets[name] = self._offsets[kept]

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of the tensor ``name`` from the header."""
        return self._infos[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of the tensor ``name`` from the file, as a new vector in C order."""
        info = self._infos[name]
        stop = min(stop, info.numel)
        part = torch.empty(max(stop - start, 0), dtype=info.dtype)
        target = part.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[name] + start * info.dtype.itemsize)
            while target:
                count = file.readinto(target)
                if not count:
                    raise _damaged(self.path, f"it ends within '{name}'")
                target = target[count:]
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``tensors`` to ``path``, whole or not at all.

    Names of one and the same tensor (equal storage, shape and strides) are written once and tied
    again by ``load_safetensors``. Other views into a common storage are written as tensors of
    their own. Every tensor is written in C order: the values of a channels-last tensor come back
    the same, contiguous. The file orders the names in its own way.

    Args:
        path: the file; its folder is made if need be.
        tensors: state-dict keys and tensors, on any device.
        metadata: strings to keep with them, such as the architecture.

    Raises:
        UserError: a metadata value is not a string, or has the reserved key ``TIED``.
    """
    notes = dict(metadata or {})
    for key, value in notes.items():
        if key == TIED or not isinstance(value, str):
            raise UserError(
                f"metadata '{key}' of {path}: keep strings, under any key but the reserved '{TIED}'"
            )
    tensors = dict(tensors)  # a lazy mapping is read once; every tensor keeps an address of its own
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


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of ``path`` into memory; names that were tied share one tensor again.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
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
    """
    return SafetensorsSource(path).metadata


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of ``path`` and the position at which the data begin."""
    if not path.is_file():
        raise UserError(f"there is no file '{path}'; give the path of a safetensors checkpoint")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise _damaged(path, "its header is cut off")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, 8 + length


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"'{path}' is damaged or no safetensors file: {what}; write or download it again"
    )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """What two names of one and the same tensor have in common."""
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )
