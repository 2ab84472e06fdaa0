"""Open the file of a checkpoint: every state dict in it, and the one that fills an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fusion.errors import UserError, shown
from fusion.modelpool.fitting import Fit, find_fit, is_counter
from fusion.weights import (
    RenamedSource,
    SafetensorsSource,
    TensorInfo,
    TensorSource,
    load_pickled,
    require_dense,
    state_dicts,
    tensors_of,
)

_SAFETENSORS = ".safetensors"
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")  # .tar as in model.pth.tar: torch.save's too
_PIECE = 1 << 20  # elements read at a time


@dataclass(frozen=True)
class Opened:
    """The tensors of a file that fill an architecture.

    Attributes:
        source: the tensors, under the architecture's own keys.
        fit: their location in the file.
    """

    source: TensorSource
    fit: Fit


def is_safetensors(path: Path) -> bool:
    """Return whether ``path`` is read as safetensors; everything else is ``torch.save``'s."""
    return path.suffix == _SAFETENSORS


def require_file(path: Path) -> None:
    """Check that a file exists and that its name is that of a checkpoint.

    Raises:
        UserError: there is none, it is a folder, or its name has another ending.
    """
    if path.is_dir():
        raise UserError(f"checkpoint '{path}' is a folder; give the file in it")
    if not path.is_file():
        raise UserError(f"checkpoint '{path}': there is no such file")
    if not is_safetensors(path) and path.suffix not in _PICKLED:
        raise UserError(
            f"checkpoint '{path}': expected a {_SAFETENSORS} file or one of {', '.join(_PICKLED)}"
        )


def open_sources(path: Path) -> Mapping[str, TensorSource]:
    """Return every state dict in a file under the dotted path of its entry.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    require_file(path)
    if is_safetensors(path):
        return {"": SafetensorsSource(path)}
    content = load_pickled(path)
    found = state_dicts(content)
    if not found:
        kind = type(content).__name__
        entries = ", ".join(map(str, content)) if isinstance(content, Mapping) else f"a {kind}"
        held = shown(entries) or "nothing"
        raise UserError(
            f"checkpoint '{path}' has no state dict in it (it holds {held}); "
            f"save one with torch.save(model.state_dict(), FILE)"
        )
    return found


def open_fitting(path: Path, expected: Mapping[str, TensorInfo], *, key: str | None) -> Opened:
    """Find the tensors in a file that fill an architecture; none is read for that.

    Args:
        path: the file.
        expected: key → shape and dtype of the architecture's tensors.
        key: selects one where several fit; see :func:`fusion.modelpool.fitting.find_fit`.

    Raises:
        UserError: the file cannot be read, none fits or several do, or the fit has other than plain
            floating-point weights.
    """
    sources = open_sources(path)
    shapes = {
        entry: {name: source.info(name).shape for name in source}
        for entry, source in sources.items()
    }
    try:
        fit = find_fit(shapes, {name: info.shape for name, info in expected.items()}, key=key)
    except UserError as error:
        raise UserError(f"checkpoint '{path}' {error}") from error
    source = sources[fit.entry]
    if not is_safetensors(path):
        require_dense(source, fit.names.values(), path=path)
    for wanted, name in fit.names.items():
        theirs, ours = source.info(name).dtype, expected[wanted].dtype
        # Averages of several networks have counters that are floating-point numbers.
        if theirs.is_floating_point != ours.is_floating_point and not is_counter(wanted):
            raise UserError(
                f"checkpoint '{path}': {shown(name)} is {theirs}, the architecture has {ours}; "
                f"give weights that are floating-point numbers"
            )
    return Opened(RenamedSource(source, fit.names), fit)


def infos(model: nn.Module) -> dict[str, TensorInfo]:
    """Return shape and dtype of all tensors that a file must have for ``model``."""
    return {
        key: TensorInfo(tuple(value.shape), value.dtype) for key, value in tensors_of(model).items()
    }


def fill(model: nn.Module, source: TensorSource) -> None:
    """Fill ``model`` piece by piece, so that the weights are in memory only once.

    Counters of batch norm that ``source`` does not have stay as they are.
    """
    for key, tensor in tensors_of(model).items():
        if key not in source and is_counter(key):
            continue
        if tensor.is_contiguous():
            flat = tensor.view(-1)
            for start in range(0, len(flat), _PIECE):
                flat[start : start + _PIECE].copy_(source.read(key, start, start + _PIECE))
        else:
            tensor.copy_(source[key])
