"""Types of options, and the check of a constructor's arguments.

A constructor declares its options by annotations, and ``@checked`` enforces them, with the same
message for ``SNRSelectiveMerge(top_p=2)`` and ``method.top_p=2``. (:func:`fusion.target.build`
checks every target of a YAML file, decorated or not.)

No library is used because ``pydantic.validate_call`` cannot read names that are imported for type
checkers only, turns a constructor's own data classes into schemas, and reports "input_value" in
three lines instead of one option, one value and one remedy.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fusion.annotations import Limit, annotations_of, misfit
from fusion.errors import UserError

LARGEST = 2**63 - 1
"""The largest number that torch takes: its integers have 64 bits."""


@dataclass(frozen=True)
class Within(Limit):
    """The range of a number.

    Args:
        least: the smallest number.
        above: exclusive lower bound.
        most: the largest number.
        below: exclusive upper bound.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Return whether the number lies in the range."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def words(self, phrase: str, value: object) -> str:
        """Return words for a number in the range; the machine's limit only where it is broken."""
        broken = isinstance(value, int | float) and value > LARGEST
        most = None if self.most == LARGEST and not broken else self.most
        if self.least is not None and most is not None:
            return f"{phrase} from {self.least} to {most}"
        bounds = [f"above {self.above}"] if self.above is not None else []
        bounds += [f"of {self.least} or more"] if self.least is not None else []
        bounds += [f"up to {most}"] if most is not None else []
        bounds += [f"below {self.below}"] if self.below is not None else []
        return f"{phrase} {' and '.join(bounds)}" if bounds else phrase


@dataclass(frozen=True)
class Length(Limit):
    """The length of a text, a list or a mapping.

    Args:
        least: the smallest length.
        exactly: the only length.
    """

    least: int = 0
    exactly: int | None = None

    def allows(self, value: Any) -> bool:
        """Return whether ``value`` has that length."""
        length = len(value) if isinstance(value, Sized) else 1  # a path
        return length >= self.least and self.exactly in (None, length)

    def words(self, phrase: str, value: object) -> str:
        """Return words for a value, such as "a list of numbers", of that length."""
        del value
        if self.exactly is not None:
            return phrase.replace("a list of", f"a list of {self.exactly}")
        if phrase.startswith(("a list", "a mapping")):
            return phrase.replace("a ", "a non-empty ", 1)
        return phrase if phrase.startswith(("lists", "mappings")) else f"{phrase} that is not empty"


@dataclass(frozen=True)
class NamesTarget(Limit):
    """A mapping that :func:`fusion.target.build` can build."""

    def allows(self, value: Any) -> bool:
        """Return whether there is a ``_target_``."""
        return "_target_" in value

    def words(self, phrase: str, value: object) -> str:
        """Return words for such a mapping."""
        del value
        return f"{phrase} with _target_"


NON_EMPTY = Length(least=1)
Count = Annotated[int, Within(least=1, most=LARGEST)]
"""A count of 1 or more."""
Whole = Annotated[int, Within(least=0, most=LARGEST)]
"""A count of 0 or more."""
SampleSize = Annotated[int, Within(least=2, most=LARGEST)]
"""Number of images for statistics; a variance needs two."""
Units = Annotated[int, Within(least=1, most=2**24)]
"""Channels or outputs of a layer; beyond 2**24 no layer has any."""
Pixels = Annotated[int, Within(least=1, most=65_535)]
"""Height or width of an image; JPEG files have no more."""
Width = Annotated[float, Within(above=0, most=100_000)]
"""Factor on the channels of every layer."""
Seed = Annotated[int, Within(least=0, most=LARGEST)]
"""Seed of random numbers."""
Positive = Annotated[float, Within(above=0)]
NonNegative = Annotated[float, Within(least=0)]
Share = Annotated[float, Within(least=0, most=1)]
"""A part of a whole, possibly nothing: in [0, 1]."""
Fraction = Annotated[float, Within(above=0, most=1)]
"""A part of a whole that is not nothing: in (0, 1]."""
Text = Annotated[str, NON_EMPTY]
FilePath = Annotated[str | Path, NON_EMPTY]
Names = Annotated[Sequence[str], NON_EMPTY]
Classes = Annotated[Sequence[int | str], NON_EMPTY]
"""Classes by their original labels or by their names."""
ImageShape = Annotated[Sequence[Count], Length(exactly=3)]
"""Channels, height and width."""
TargetMapping = Annotated[Mapping[str, Any], NamesTarget()]
"""Mapping from which :func:`fusion.target.build` builds an object."""

T = TypeVar("T", bound=Callable[..., Any])


def checked(target: T) -> T:
    """Check the arguments of a function, or of a class's constructor, at every call.

    Put it above ``def``, or above ``@dataclass``. Defaults are not checked.

    Raises:
        UserError: at a call, an argument that its annotation does not allow.

    Example::

        >>> @checked
        ... def keep(*, density: Fraction = 0.2) -> float:
        ...     return density
        >>> keep(density=1.5)
        Traceback (most recent call last):
        fusion.errors.UserError: keep.density is 1.5; give a number above 0 and up to 1
    """
    if isinstance(target, type):
        target.__init__ = _checked(target.__init__, target)  # type: ignore[misc]
        return target
    return _checked(target, target)  # type: ignore[return-value]


def _checked(function: Callable[..., Any], owner: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    first = next(iter(signature.parameters), "")
    annotations: dict[str, Any] = {}  # read at the first call: a module may still be half imported

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError:  # the call itself raises the clearest error
            return function(*args, **options)
        if not annotations:
            annotations.update({first: Any}, **annotations_of(owner))
        method = first == "self"
        name = type(bound.arguments[first]).__name__ if method else function.__name__
        for option, value in bound.arguments.items():
            check_option(name, signature.parameters[option], annotations.get(option, Any), value)
        return function(*args, **options)

    return call


def check_option(owner: str, parameter: inspect.Parameter, annotation: Any, value: object) -> None:
    """Check one argument.

    Args:
        owner: whose option it is, for the message.
        parameter: the option; its own default is always valid.
        annotation: its annotation.
        value: its value.

    Raises:
        UserError: it is something else.
    """
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return
    if value is parameter.default:
        return
    wrong = misfit(value, annotation)
    if wrong is not None:
        raise UserError(wrong.sentence(f"{owner}.{parameter.name}"))
