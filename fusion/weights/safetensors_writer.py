"""A safetensors file that is written part by part, in any order and from several threads."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.files import atomic_path
from fusion.weights.safetensors_header import TIED, checked_notes, make_header
from fusion.weights.source import TensorInfo


@contextmanager
def writing_safetensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str] | None = None,
    *,
    tied: Mapping[str, str] | None = None,
) -> Iterator[SafetensorsWriter]:
    """Yield a writer of a file that is filled part by part and appears complete or not at all.

    When the block ends, every element must have been written. The file is then identical to that of
    :func:`save_safetensors` for the whole tensors.

    Args:
        path: the file; its folder is created if necessary.
        infos: shape and dtype of the tensors.
        metadata: strings to keep with them.
        tied: further name → the name in ``infos`` whose tensor it is.

    Raises:
        UserError: a metadata value is not a string, or has the reserved key ``TIED``; there is not
            enough space on the disk.

    Example::

        >>> import tempfile
        >>> import torch
        >>> from fusion.weights import TensorInfo, load_safetensors, writing_safetensors
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> with writing_safetensors(path, {"w": TensorInfo((4,), torch.float32)}) as writer:
        ...     writer.write("w", 0, torch.zeros(2))
        ...     writer.write("w", 2, torch.ones(2))
        >>> load_safetensors(path)
        {'w': tensor([0., 0., 1., 1.])}
        >>> folder.cleanup()
    """
    notes = checked_notes(path, metadata)
    if tied:
        notes[TIED] = json.dumps(dict(tied))
    header, starts = make_header(infos, notes)
    size = len(header) + sum(info.nbytes for info in infos.values())
    with atomic_path(path) as temporary, temporary.open("rb+", buffering=0) as file:
        free = shutil.disk_usage(temporary.parent).free
        if size > free:
            raise UserError(
                f"'{path}' will have {size / 2**20:.0f} MiB, and its disk has {free / 2**20:.0f} "
                f"left; make room, or choose a folder on another one"
            )
        file.write(header)
        file.truncate(size)
        writer = SafetensorsWriter(file, infos, starts)
        yield writer
        writer.require_whole()


class SafetensorsWriter:
    """A file that is being filled; several threads may write to it.

    Args:
        file: open for writing, with the header in it.
        infos: shape and dtype of the tensors.
        starts: name → position in the file of its first byte.
    """

    def __init__(
        self, file: FileIO, infos: Mapping[str, TensorInfo], starts: Mapping[str, int]
    ) -> None:
        self._file = file
        self._infos = infos
        self._starts = starts
        self._left = sum(info.nbytes for info in infos.values())
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the order of the file, in which writing is fastest."""
        return iter(self._starts)

    def write(self, name: str, start: int, part: Tensor) -> None:
        """Write the elements from ``start`` on of the tensor ``name``, each once.

        Args:
            name: the tensor.
            start: the first element, counted in C order.
            part: (k,) on the CPU, of the tensor's dtype.
        """
        info = self._infos[name]
        if part.dtype != info.dtype or start + len(part) > info.numel:
            raise ValueError(f"{len(part)} elements of {part.dtype} from {start} are not '{name}'")
        data = part.contiguous().view(torch.uint8).numpy().data
        with self._lock:
            self._left -= len(data)
            self._file.seek(self._starts[name] + start * info.dtype.itemsize)
            while data:
                data = data[self._file.write(data) :]

    def require_whole(self) -> None:
        """Check that every element was written.

        Raises:
            RuntimeError: some elements are missing.
        """
        if self._left:
            raise RuntimeError(f"{self._left} bytes of a safetensors file were not written")
