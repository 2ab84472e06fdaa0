"""Building an architecture that a file asks for, with work and memory bounded by that file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fusion.errors import UserError, first_line

# The networks of torchvision call torch 5 to 14 times for each tensor that they keep, and make up
# to 4.5 times the elements that they keep (SSD drops the classifier of its VGG).
_CALLS_PER_TENSOR = 50
_CALLS_AT_LEAST = 5_000
_ELEMENTS_PER_BYTE = 8
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

# What a constructor may raise when its options make no sense to it.
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
    """How much a constructor may do.

    Attributes:
        calls: of torch functions.
        elements: of all new tensors together.
    """

    calls: int
    elements: int


def bounds_of_file(tensors: int, size: int) -> Bounds:
    """Return what a network may cost whose weights are ``tensors`` tensors in ``size`` bytes.

    A network that fits the file keeps no more tensors and elements than the file has, since an
    element takes a byte at least; a multiple of both leaves room for what constructors drop again.
    """
    return Bounds(
        calls=_CALLS_AT_LEAST + _CALLS_PER_TENSOR * tensors,
        elements=_ELEMENTS_AT_LEAST + _ELEMENTS_PER_BYTE * size,
    )


@contextmanager
def bounded(bounds: Bounds, *, path: Path) -> Iterator[None]:
    """Bound what is built inside, and tell what goes wrong there as a mistake in ``path``.

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
    """Count calls of torch functions and elements of new tensors on this thread."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self._bounds = bounds
        self._calls = 0
        self._elements = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        if func in _FACTORIES:
            unmade = func(*args, **{**kwargs, "device": "meta"})
            self._elements += unmade.numel()
        if self._calls > self._bounds.calls or self._elements > self._bounds.elements:
            raise UserError("it is far greater than the file")
        return func(*args, **kwargs)
