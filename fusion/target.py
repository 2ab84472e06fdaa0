"""Build the object that a mapping with ``_target_`` describes.

The registry of this package is the import path: a mapping with ``_target_``, the path of a class
or function, and its options beside it. Mappings and lists nested in the options are built first,
unless ``_recursive_`` is false; ``_args_`` are positional; ``_partial_`` returns the callable
unfinished.

These are Hydra's words with Hydra's meaning, read here without Hydra so that plain Python and a
YAML file say the same thing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.errors import UserError, suggestion

_KINDS: dict[str, type] = {
    "None": type(None),
    "bool": bool,
    "int": numbers.Integral,
    "float": numbers.Real,
    "str": str,
    "Path": Path,
}
_WORDS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def is_target(value: object) -> bool:
    """Return whether ``value`` is a mapping that names a ``_target_``."""
    return isinstance(value, Mapping) and "_target_" in value


def build(spec: Mapping[str, Any], /, **more: Any) -> Any:
    """Build the object that ``spec`` describes, with ``more`` keyword arguments added.

    Raises:
        UserError: the target cannot be imported, or an option is unknown or missing.
    """
    where = str(spec["_target_"])
    target = locate(where)
    options: dict[str, Any] = {k: v for k, v in spec.items() if k not in _WORDS} | more
    args: list[Any] = list(spec.get("_args_", ()))
    if spec.get("_recursive_", True):
        options = {name: build_nested(value) for name, value in options.items()}
        args = [build_nested(value) for value in args]
    partial = bool(spec.get("_partial_", False))
    check_options(target, where, args, options, partial=partial)
    return functools.partial(target, *args, **options) if partial else target(*args, **options)


def build_nested(value: Any) -> Any:
    """Build every target inside ``value``, however deep in mappings and lists; copy the rest."""
    if is_target(value):
        return build(value)
    if isinstance(value, Mapping):
        return {key: build_nested(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(build_nested(item) for item in value)
    return value


def locate(path: str) -> Callable[..., Any]:
    """Import the callable at the dotted ``path``.

    Raises:
        UserError: no such module or attribute, or it is not callable. An error inside the module
            that is being imported is not a slip of the path and passes through as it is.
    """
    parts = path.split(".")
    found: Any = None
    depth = 0
    for depth in range(len(parts), 0, -1):
        module = ".".join(parts[:depth])
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
        except ValueError:  # an empty part, as in "a..b"
            break
    if found is None:
        raise UserError(
            f"_target_ '{path}': there is no module '{parts[0]}'; give the import path of a class, "
            f"'package.module.Class', whose package is installed or lies in the current folder"
        )
    if 1 < depth == len(parts):  # a package may give a module's name to a function in it
        found = getattr(importlib.import_module(path.rpartition(".")[0]), parts[-1], found)
    for at in range(depth, len(parts)):
        if not hasattr(found, parts[at]):
            owner = ".".join(parts[:at])
            raise UserError(
                f"_target_ '{path}': '{owner}' has no '{parts[at]}'"
                f"{suggestion(parts[at], dir(found))}"
            )
        found = getattr(found, parts[at])
    if not callable(found):
        raise UserError(f"_target_ '{path}' is not callable; name a class or a function")
    return found  # type: ignore[no-any-return]


def check_options(
    target: Callable[..., Any],
    where: str,
    args: Sequence[Any],
    options: Mapping[str, Any],
    *,
    partial: bool = False,
) -> None:
    """Check that ``target`` can be called with ``args`` and ``options``; ``where`` names it.

    Raises:
        UserError: an option that the signature does not have (with the nearest that it has), a
            required one that is missing, or text where the signature says a number.
    """
    try:
        signature = inspect.signature(target)
    except ValueError:  # some builtins show no signature: the call itself will tell
        return
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        named = [
            n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        for option in options:
            if option not in named:
                raise UserError(
                    f"{where} has no option '{option}'{suggestion(option, named)} "
                    f"(options: {', '.join(named) or 'none'})"
                )
    try:
        (signature.bind_partial if partial else signature.bind)(*args, **options)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error
    for option, value in options.items():
        if option in parameters:
            _check_kind(parameters[option].annotation, where, option, value)


def _check_kind(annotation: object, where: str, option: str, value: object) -> None:
    """Check a value against an annotation made of plain kinds, such as ``float | None``."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = text.split(" | ")
    if not set(kinds) <= _KINDS.keys():
        return
    accepted = tuple(_KINDS[kind] for kind in kinds)
    if isinstance(value, bool) and "bool" not in kinds:  # Python counts True as a number
        accepted = (str,) if "str" in kinds else ()
    if not isinstance(value, accepted):
        raise UserError(
            f"{where}: {option} is {value!r}, which is no {text.replace(' | ', ' or ')}"
        )
