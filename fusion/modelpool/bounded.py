"""Build an architecture that a file requests, with work and memory bounded by that file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fusion.errors import UserError, first_line

# Constructors of torchvision make up to 1.2 tensors for each that they keep, and 4.5 times the
# elements (SSD drops the classifier of its VGG); where the meta device fails them, they run twice.
_TENSORS_PER_TENSOR = 8
_TENSORS_AT_LEAST = 2_000
_ELEMENTS_PER_BYTE = 10
_ELEMENTS_AT_LEAST = 1 << 24

_FACTORIES = (
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.arange,
    torch.linspace,
    torch.eye,
)

# Exceptions of constructors for invalid options.
_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)


@dataclass(frozen=True)
class Bounds:
    """Limits of a constructor.

    Attributes:
        tensors: number of new ones.
        elements: total number of their elements.
    """

    tensors: int
    elements: int


def bounds_of_file(tensors: int, size: int) -> Bounds:
    """Return the limits for a network whose weights are ``tensors`` tensors in ``size`` bytes.

    A network that fits the file keeps no more tensors and elements than the file has, since an
    element takes a byte at least; a multiple of both allows for tensors that constructors drop
    again.
    """
    return Bounds(
        tensors=_TENSORS_AT_LEAST + _TENSORS_PER_TENSOR * tensors,
        elements=_ELEMENTS_AT_LEAST + _ELEMENTS_PER_BYTE * size,
    )


@contextmanager
def bounded(bounds: Bounds, *, path: Path) -> Iterator[None]:
    """Bound constructors within the block, and report their errors as a mistake in ``path``.

    Tensors are counted before they are made, on the meta device too.

    Raises:
        UserError: the architecture grows beyond ``bounds`` or cannot be built.
    """
    try:
        with _Counting(bounds):
            yield
    except _ERRORS as error:
        raise UserError(
            f"'{path}' asks for an architecture that cannot be built: {first_line(error)[:200]}; "
            f"give `architecture` yourself"
        ) from error


class _Counting(TorchFunctionMode):
    """Count the tensors that are made on this thread, and their elements.

    Only a function that makes tensors is ever refused. Others pass in any case, since leaving a
    context such as ``torch.no_grad`` on the way out of a constructor calls them, too.
    """

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self._bounds = bounds
        self._tensors = 0
        self._elements = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            self._tensors += 1
            self._elements += func(*args, **{**kwargs, "device": "meta"}).numel()
            if self._tensors > self._bounds.tensors or self._elements > self._bounds.elements:
                raise UserError("it is far greater than the file")
        return func(*args, **kwargs)
