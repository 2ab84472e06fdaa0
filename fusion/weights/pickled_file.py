"""Files of ``torch.save``: read as plain tensors, numbers and strings, never as code."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.errors import UserError, first_line, shown
from fusion.weights.file_kinds import recognise
from fusion.weights.source import StateDictSource, TensorSource

# Training scripts save their arguments along with the weights. Both types only hold values.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePath, f"pathlib.{home}") for home in ("PosixPath", "WindowsPath")),
]

# Exceptions of torch.load for a file that is truncated, altered or malicious.
_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # as torch names refused objects
_OTHER_PROTOCOL = re.compile(r"Unsupported operand 1(4\d|5[0-2])\b")  # instructions that 2 lacks
_NETWORK = b"torch.nn.modules."  # classes whose names a pickled network holds
_SEARCHED = 1 << 20  # bytes of a file searched for them
_DEPTH = 3  # mappings within mappings that are searched for state dicts


def load_pickled(path: Path) -> object:
    """Read what ``torch.save`` wrote to ``path``, on the CPU and with ``weights_only=True``.

    Tensors of a zip archive (torch 1.6 and later) are mapped into memory: they take no memory until
    they are read.

    Raises:
        UserError: there is no such file, it is no file of ``torch.save``, it is damaged, or it
            holds objects whose code would have to run.

    Example::

        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from fusion.weights import load_pickled, state_dicts
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "model.pth")
        >>> torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, path)
        >>> load_pickled(path)["epoch"]
        3
        >>> folder.cleanup()
    """
    if not path.is_file():
        raise UserError(f"there is no file '{path}'; give the path of a checkpoint")
    try:
        kind = recognise(path)
        if kind.name != "torch":
            is_other = kind.what or "it is a safetensors file; give it the ending .safetensors"
            raise UserError(f"'{path}' is damaged or no file of torch.save: {is_other}")
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the relevant ones are reported below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind.mappable)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except _ERRORS as error:
        raise UserError(f"'{path}' {_reason(path, error)}") from error


def state_dicts(content: object) -> dict[str, StateDictSource]:
    """Return every mapping in ``content`` that holds tensors, under its dotted path.

    The path of ``content`` itself is the empty string. Entries that are not tensors (an epoch, a
    learning rate) are omitted, and a mapping that occurs in several places is returned once.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dicts
        >>> content = {"epoch": 3, "state_dict": {"w": torch.ones(2)}}
        >>> {key: list(source) for key, source in state_dicts(content).items()}
        {'state_dict': ['w']}
    """
    found: dict[str, StateDictSource] = {}
    seen: set[int] = set()

    def collect(value: object, way: tuple[str, ...]) -> None:
        if not isinstance(value, Mapping) or id(value) in seen:
            return
        seen.add(id(value))
        named = {name: item for name, item in value.items() if isinstance(name, str)}
        tensors = {name: item for name, item in named.items() if isinstance(item, Tensor)}
        if tensors:
            found[".".join(way)] = StateDictSource(tensors)
        if len(way) < _DEPTH:
            for name, item in named.items():
                collect(item, (*way, name))

    collect(content, ())
    return found


def require_dense(source: TensorSource, names: Iterable[str], *, path: Path) -> None:
    """Check that tensors of a pickled file are dense, with their values in memory.

    Raises:
        UserError: names one that is sparse, quantized or on the meta device.

    Example::

        >>> from pathlib import Path
        >>> import torch
        >>> from fusion.weights import StateDictSource, require_dense
        >>> source = StateDictSource({"w": torch.ones(2)})
        >>> require_dense(source, ["w"], path=Path("model.pth"))  # a sparse tensor would raise
    """
    for name in names:
        tensor = source[name]
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else "sparse or quantized"
            raise UserError(f"'{path}': {shown(name)} is {kind}; save dense floating-point weights")


def _reason(path: Path, error: BaseException) -> str:
    """Return a clause on why torch.load refused a file."""
    said = str(error)
    refused = _REFUSED.search(said)
    again = "save the weights alone: torch.save(model.state_dict(), FILE)"
    if refused and _holds_network(path):
        return (
            f"holds a whole pickled network ({shown(refused[1])}), whose code would have to run; "
            f"{again}"
        )
    if refused:
        return f"holds {shown(refused[1])} besides tensors, whose code would have to run; {again}"
    if _OTHER_PROTOCOL.search(said):
        return (
            "is damaged, or a pickle of another protocol than torch.save's own, 2; write it again"
        )
    what = "" if isinstance(error, pickle.UnpicklingError) else f" ({shown(first_line(error))})"
    return f"is cut short or damaged{what}; write or download it again"


def _holds_network(path: Path) -> bool:
    with path.open("rb") as file:
        return _NETWORK in file.read(_SEARCHED)
