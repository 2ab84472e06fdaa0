"""The header of a safetensors file, parsed once and validated against its schema.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the
header, a JSON header with dtype, shape and place of each tensor, then the little-endian data. The
library's own reader checks the file first: it refuses data that overlap, leave gaps or end
elsewhere than the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fusion.errors import UserError, first_line, shown
from fusion.weights.file_kinds import recognise
from fusion.weights.source import TensorInfo

METADATA = "__metadata__"
TIED = "fusion.tied"  # metadata key: JSON object, name -> the name under which the tensor is kept
LENGTH_BYTES = 8
_INT64 = 2**63  # sizes of torch are signed

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


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file.

    Attributes:
        infos: name → shape and dtype, in the order of the file.
        starts: name → position in the file of its first byte.
        metadata: strings stored with the tensors.
    """

    infos: Mapping[str, TensorInfo]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``.

    Raises:
        UserError: there is no such file, it cannot be opened, or it is not a whole safetensors
            file.
    """
    if not path.is_file():
        raise UserError(f"there is no file '{path}'; give the path of a safetensors checkpoint")
    state = path.stat()
    stamp = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return _read_header(path, stamp)


@lru_cache(maxsize=64)  # a run asks for the header of each member dozens of times
def _read_header(path: Path, stamp: tuple[int, ...]) -> Header:
    """Read a header; ``stamp`` changes when the file does."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            text = file.read(length)
    except SafetensorError as error:
        raise damaged(path, _reason(path, error)) from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        raise damaged(path, f"its header is not JSON, {shown(first_line(error))}") from error
    if not isinstance(content, dict):
        raise damaged(path, "its header is not a JSON object")
    metadata = content.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its metadata are not strings")
    infos: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    size = path.stat().st_size
    for name, entry in content.items():
        info, begin, end = _entry(path, name, entry)
        starts[name] = LENGTH_BYTES + length + begin
        if LENGTH_BYTES + length + end > size:
            raise damaged(path, f"it ends within '{shown(name)}'")
        infos[name] = info
    return Header(infos, starts, metadata)


def sort_metadata(path: Path) -> None:
    """Order the metadata in the header of a whole file by key, in place.

    The library writes them in the order of a hash map, which differs between processes, so that
    equal input would give different files.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        metadata = header.pop(METADATA, None)
        if metadata is None:
            return
        text = _header_bytes(metadata, header)
        if len(text) > length:
            raise RuntimeError(f"the sorted header of {path} is longer than the one it replaces")
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(length))  # the format fills a header up with spaces


def make_header(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the beginning of a file, and name → position in the file of its first byte.

    It is the header that the library writes for these tensors, the metadata ordered by key.

    Args:
        infos: shape and dtype of the tensors.
        metadata: strings to keep with them.
    """
    # The library determines the order: it is given empty tensors of these names and dtypes.
    empty = {name: torch.empty(0, dtype=info.dtype) for name, info in infos.items()}
    written = save(empty)
    names = json.loads(written[LENGTH_BYTES:])
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    entries: dict[str, Any] = {}
    offset = 0
    for name in names:
        info = infos[name]
        entries[name] = {
            "dtype": kinds[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = _header_bytes(metadata, entries)
    text = text.ljust(-(-len(text) // LENGTH_BYTES) * LENGTH_BYTES)  # the data are aligned
    first = LENGTH_BYTES + len(text)
    starts = {name: first + entry["data_offsets"][0] for name, entry in entries.items()}
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, starts


def checked_notes(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return a checked copy of a caller's metadata.

    Raises:
        UserError: a value is not a string, or has the reserved key ``TIED``.
    """
    notes = dict(metadata or {})
    for key, value in notes.items():
        if key == TIED or not isinstance(value, str):
            raise UserError(
                f"metadata '{key}' of {path}: keep strings, under any key but the reserved '{TIED}'"
            )
    return notes


def _header_bytes(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    """Return the JSON of a header, the metadata ordered by key."""
    content = {METADATA: dict(sorted(metadata.items())), **entries}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a damaged file; ``what`` describes the damage."""
    return UserError(f"'{path}' is damaged or no safetensors file: {what}")


def _entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """Return shape and dtype of a tensor, and where its data begin and end behind the header."""
    if not isinstance(entry, Mapping):
        raise damaged(path, f"'{shown(name)}' is not described by a JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets):
        raise damaged(path, f"'{shown(name)}' lacks a dtype, a shape or offsets of its data")
    if dtype not in _DTYPES:
        raise UserError(f"'{path}': '{shown(name)}' has the dtype {shown(dtype)}, unknown to torch")
    # Strides multiply the sizes of an empty tensor too.
    if math.prod(max(size, 1) for size in shape) >= _INT64:
        raise damaged(path, f"the shape of '{shown(name)}' exceeds any memory")
    info = TensorInfo(tuple(shape), _DTYPES[dtype])
    if len(offsets) != 2 or offsets[1] - offsets[0] != info.nbytes:
        raise damaged(path, f"'{shown(name)}' does not have the size of its shape")
    return info, offsets[0], offsets[1]


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of integers from 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _reason(path: Path, error: SafetensorError) -> str:
    kind = recognise(path)
    if kind.name == "other":
        return kind.what
    if kind.name == "torch":
        return "torch.save wrote it; give it the ending .pt"
    return f"{shown(first_line(error))}; write or download it again"
