"""Detection of file kinds by their first bytes, for clear errors before weights are read."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusion.errors import shown

_HEAD = 512  # bytes that are examined; the mark of a tar archive is at byte 257
_PICKLE_PROTOCOLS = b"\x02\x03\x04\x05"

_STARTS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com",
        "it is a Git LFS pointer, which stands for the file; fetch the file with 'git lfs pull'",
    ),
    (b"\x93NUMPY", "it is a NumPy array (.npy); give a state dict"),
    (
        b"\x89HDF\r\n\x1a\n",
        "it is an HDF5 file, as Keras writes them; give a state dict of PyTorch",
    ),
    (b"\x89PNG", "it is an image (PNG)"),
    (b"\xff\xd8\xff", "it is an image (JPEG)"),
    (b"GGUF", "it is a GGUF file, which holds language models"),
    (b"\x1f\x8b", "it is compressed (gzip); unpack it first"),
    (b"BZh", "it is compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ", "it is compressed (xz); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is compressed (zstd); unpack it first"),
)
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")
# The first fields of an ONNX model in protobuf: ir_version, then a producer, graph or opset.
_ONNX_FIELDS = b"\x12\x1a\x3a\x42"
_ONNX_VERSIONS = 0x20


@dataclass(frozen=True)
class FileKind:
    """The kind of a file.

    Attributes:
        name: ``"safetensors"``, ``"torch"`` for what ``torch.save`` writes, or ``"other"``.
        mappable: whether its tensors lie in the file as they are in memory: in a zip archive
            without compression, as ``torch.save`` writes since torch 1.6.
        what: for anything else, a clause that describes it and, if there is one, the remedy.
    """

    name: Literal["safetensors", "torch", "other"]
    mappable: bool = False
    what: str = ""


def recognise(path: Path) -> FileKind:
    """Return the kind of the file at ``path``, from its first bytes and a zip's directory."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for start, what in _STARTS:
        if head.startswith(start):
            return FileKind("other", what=what)
    if head.startswith(b"PK"):
        return _zip(path)
    if head[:1] == b"\x80" and head[1:2] and head[1] in _PICKLE_PROTOCOLS:
        return FileKind("torch")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= path.stat().st_size - 8:
        return FileKind("safetensors")
    return FileKind("other", what=_unlike_weights(head))


def _zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error, NotImplementedError):
        return FileKind("other", what="it is cut short; write or download it again")
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        what = (
            "it is a TorchScript archive; read it with torch.jit.load and save its state_dict() "
            "with torch.save"
        )
        return FileKind("other", what=what)
    if any(name.endswith("data.pkl") for name in names):
        return FileKind("torch", mappable=stored)
    if names and all(name.endswith(".npy") for name in names):
        return FileKind("other", what="it is a NumPy archive (.npz); give a state dict")
    listed = shown(", ".join(sorted(names)[:3]))
    return FileKind("other", what=f"it is a zip archive of {listed or 'nothing'}; unpack it first")


def _unlike_weights(head: bytes) -> str:
    if not head:
        return "it is empty; write or download it again"
    if head.lstrip().lower().startswith(_MARKUP):
        return "it is a web page, which a failed download leaves; download the file itself"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    if len(head) > 2 and head[0] == 8 and head[1] < _ONNX_VERSIONS and head[2] in _ONNX_FIELDS:
        return "it is an ONNX model; give the state dict of the PyTorch network"
    if head.isascii() and head.decode("ascii").replace("\n", "").replace("\t", "").isprintable():
        return "it is a text file"
    return "its content is not that of torch.save or safetensors; write or download it again"
