"""Check values against annotations, and describe mismatches in words.

Annotations are read as type checkers read them, with three differences. A ``bool`` is no number and
a ``float`` is finite. A list stands for any ``Sequence`` or ``tuple``, since YAML has no other. And
an object that is not one of YAML's own values is taken for a foreign class on trust: data sets are
often no subclass of ``torch.utils.data.Dataset``.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import numbers
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal, Union

from fusion.errors import shown, suggestion

_SHORT = reprlib.Repr()  # limit for values of any size or depth
_SHORT.maxstring = 60
_SHORT.maxlevel = 2

_SEQUENCES = (
    list,
    tuple,
    collections.abc.Sequence,
    collections.abc.Collection,
    collections.abc.Iterable,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_PLAIN = (type(None), bool, numbers.Number, str, bytes, Mapping, list, tuple)
_WORDS: dict[object, tuple[str, str]] = {  # one of them, and several
    type(None): ("null", "null"),
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "text"),
    type: ("a class", "classes"),
}


class Limit:
    """Limit that an annotation adds to a kind: ``Annotated[float, Within(least=0)]``."""

    def allows(self, value: Any) -> bool:
        """Return whether a value of the kind is allowed."""
        raise NotImplementedError

    def words(self, phrase: str, value: object) -> str:
        """Return the words for the kind with those for the limit; ``value`` is what came."""
        raise NotImplementedError


@dataclass(frozen=True)
class Misfit:
    """A value that does not match its annotation.

    Attributes:
        value: the value.
        wanted: the annotation in words.
        at: where in a list or mapping the value is, such as ``"[1]"``; empty for the whole.
        choices: the valid words, if it has to be one of a few.
    """

    value: object
    wanted: str
    at: str = ""
    choices: tuple[str, ...] = ()

    def sentence(self, option: str) -> str:
        """Return the message on ``option``: its name, the given value, and the allowed ones."""
        hint = suggestion(self.value, self.choices) if isinstance(self.value, str) else ""
        if isinstance(self.value, float) and self.value.is_integer() and "whole" in self.wanted:
            hint = f", written {int(self.value)}"
        return f"{option}{self.at} is {told(self.value)}; give {self.wanted}{hint}"


def misfit(value: object, annotation: Any) -> Misfit | None:
    """Return the mismatch of ``value`` and ``annotation``, or ``None`` if it matches."""
    annotation = type(None) if annotation is None else annotation
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = misfit(value, args[0])
        limits = [limit for limit in args[1:] if isinstance(limit, Limit)]
        fits = inner is None and all(limit.allows(value) for limit in limits)
        return inner if inner is not None and inner.at else _whole(value, annotation, fits)
    if origin in (Union, types.UnionType):
        found = [misfit(value, kind) for kind in args]
        if None in found:
            return None
        # For a list with one wrong entry, name that entry.
        inside = [wrong for wrong in found if wrong is not None and wrong.at]
        return inside[0] if inside else _whole(value, annotation, fits=False)
    if origin is Literal:
        fits = any(type(value) is type(known) and value == known for known in args)
        return _whole(value, annotation, fits)
    kind = origin or annotation
    if kind in _SEQUENCES:
        return _list_misfit(value, annotation, args)
    if kind in _MAPPINGS:
        return _mapping_misfit(value, annotation, args)
    if kind in (collections.abc.Callable, Callable):
        return _whole(value, annotation, callable(value))
    return _whole(value, annotation, not isinstance(kind, type) or _is_a(value, kind))


def told(value: object) -> str:
    """Return a value as a message shows it: as YAML writes it, in one line, bounded."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {math.ceil(abs(value).bit_length() * math.log10(2))} digits"
    if isinstance(value, numbers.Number | os.PathLike):
        return shown(str(value))
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return _SHORT.repr(value) if isinstance(value, _PLAIN) else f"of type {type(value).__name__}"


def annotations_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return parameter → annotation of a function or a class, with text evaluated.

    A name that only type checkers import stands for anything.
    """
    if isinstance(target, partial):
        return annotations_of(target.func)
    places: list[dict[str, Any]] = []
    if isinstance(target, type):
        # The fields of a data class may have been written in the modules of its bases.
        places = [vars(sys.modules[base.__module__]) for base in target.__mro__ if _module(base)]
        made_here = dataclasses.is_dataclass(target) and "__init__" in vars(target)
        constructor = inspect.unwrap(vars(target).get("__init__", target.__init__))  # type: ignore[misc]
        if not made_here and hasattr(constructor, "__globals__"):
            places.insert(0, constructor.__globals__)
    else:
        function = inspect.unwrap(getattr(target, "__func__", target))
        function = function if hasattr(function, "__globals__") else type(target).__call__
        places = [getattr(function, "__globals__", {})]
    parameters = inspect.signature(target).parameters.values()
    names = _Names(*places)
    return {p.name: _evaluated(p.annotation, names) for p in parameters}


class _Names(collections.ChainMap[str, Any]):
    """The names of several modules; one that none of them has stands for anything."""

    def __missing__(self, name: str) -> Any:
        builtin = vars(sys.modules["builtins"])
        return builtin.get(name, Any)


def _module(base: type) -> bool:
    return base.__module__ in sys.modules


def _evaluated(annotation: Any, names: Mapping[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {}, names)
    except (AttributeError, TypeError):  # `fabric.Fabric` of a module that is not imported
        return Any


def _whole(value: object, annotation: Any, fits: bool) -> Misfit | None:
    """Return the misfit of a value as a whole, or ``None`` where it fits."""
    if fits:
        return None
    phrases = _phrases(annotation, value, several=False)
    return Misfit(value, _listed(phrases), "", _choices(annotation))


def _is_a(value: object, kind: type) -> bool:
    """Return whether ``value`` is of a class."""
    if kind in (object, Any):
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and _is_finite(value)
    try:
        if isinstance(value, kind):
            return True
    except TypeError:  # a protocol that only type checkers read
        return not isinstance(value, _PLAIN)
    foreign = not kind.__module__.startswith("fusion.")
    if issubclass(kind, Enum) and foreign:  # torchvision takes the names of its weights
        return isinstance(value, str)
    return foreign and not isinstance(value, _PLAIN)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of float
        return False


def _list_misfit(value: object, annotation: Any, args: Sequence[Any]) -> Misfit | None:
    if not isinstance(value, list | tuple):
        # Arrays, sets and generators are lists as well.
        foreign = hasattr(value, "__iter__") and not isinstance(value, _PLAIN)
        return _whole(value, annotation, fits=foreign)
    entries = [args[0]] * len(value) if args and len(args) in (1, 2) else []
    if len(args) > 1 and args[-1] is not Ellipsis:
        if len(value) != len(args):
            return _whole(value, annotation, fits=False)
        entries = list(args)
    for number, (entry, kind) in enumerate(zip(value, entries, strict=False)):
        if (wrong := misfit(entry, kind)) is not None:
            return dataclasses.replace(wrong, at=f"[{number}]{wrong.at}")
    return None


def _mapping_misfit(value: object, annotation: Any, args: Sequence[Any]) -> Misfit | None:
    if not isinstance(value, Mapping):
        return _whole(value, annotation, fits=False)
    for name, entry in value.items() if args else ():
        if misfit(name, args[0]) is not None:
            return Misfit(name, _listed(_phrases(args[0], name, several=False)), ", a name in it,")
        if (wrong := misfit(entry, args[1])) is not None:
            return dataclasses.replace(wrong, at=f".{name}{wrong.at}")
    return None


def _phrases(annotation: Any, value: object, *, several: bool) -> list[str]:
    """Return words for each of the alternatives that an annotation allows."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        phrases = _phrases(args[0], value, several=several)
        for limit in args[1:]:
            if isinstance(limit, Limit):
                phrases = [limit.words(phrase, value) for phrase in phrases]
        return phrases
    if origin in (Union, types.UnionType):
        paths = any(isinstance(kind, type) and issubclass(kind, os.PathLike) for kind in args)
        kinds = [kind for kind in args if not (paths and kind is str)]
        return [phrase for kind in kinds for phrase in _phrases(kind, value, several=several)]
    if origin is Literal:
        return [str(known) if known != "" else "''" for known in args]
    kind = origin or annotation
    if kind in _SEQUENCES:
        inside = [] if not args or args[0] is Any else _phrases(args[0], value, several=True)
        entries = f" of {' or '.join(dict.fromkeys(inside))}" if inside else ""
        return [("lists" if several else "a list") + entries]
    if kind in _MAPPINGS:
        inside = [] if not args or args[1] is Any else _phrases(args[1], value, several=True)
        entries = f" of names to {' or '.join(dict.fromkeys(inside))}" if inside else ""
        return [("mappings" if several else "a mapping") + entries]
    if kind in (collections.abc.Callable, Callable):
        return ["a function"]
    if kind in _WORDS:
        endless = kind is float and isinstance(value, numbers.Real) and not _is_finite(value)
        finite = "finite " * (endless and not several)
        return [_WORDS[kind][several].replace("a number", f"a {finite}number")]
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return ["paths" if several else "a path"]
    name = getattr(kind, "__name__", str(kind))
    if several:
        return [f"{name} objects", "mappings with _target_"]
    return [f"{'an' if name[0] in 'AEIOU' else 'a'} {name}", "a mapping with _target_"]


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the texts that an annotation names."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return tuple(known for known in args if isinstance(known, str))
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated):
        return tuple(name for kind in args for name in _choices(kind))
    return ()


def _listed(phrases: Sequence[str]) -> str:
    """Return alternatives as a sentence lists them."""
    distinct = list(dict.fromkeys(phrases))
    *rest, last = distinct
    if not rest:
        return last
    comma = "," if any(" " in phrase for phrase in distinct) else ""
    return f"{', '.join(rest)}{comma} or {last}"
