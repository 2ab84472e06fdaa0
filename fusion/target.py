"""Build the object that a mapping with ``_target_`` describes.

The registry of this package is the import path: a mapping with ``_target_``, the path of a class or
function, and its options. Mappings and lists nested in the options are built first, unless
``_recursive_`` is false; ``_args_`` are positional; ``_partial_`` returns the callable unfinished.

The keys have Hydra's meaning, but are read without Hydra, so that plain Python and a YAML file are
equivalent.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.annotations import annotations_of, misfit, told
from fusion.errors import UserError, first_line, suggestion
from fusion.options import check_option

_WORDS: dict[str, Any] = {
    "_target_": str,
    "_args_": Sequence[Any],
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Any,
}
# Exceptions of constructors for invalid options. (RuntimeError has other reasons: some constructors
# cannot work on the meta device.)
_REFUSALS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    ModuleNotFoundError,
)
_EXTRAS = {
    "timm": "timm",
    "tensorboard": "tensorboard",
    "onnx": "onnx",
    "huggingface_hub": "hub",
    "wandb": "wandb",
}


def is_target(value: object) -> bool:
    """Return whether ``value`` is a mapping that names a ``_target_``."""
    return isinstance(value, Mapping) and "_target_" in value


def build(spec: Mapping[str, Any], /, **more: Any) -> Any:
    """Build the object that ``spec`` describes, with ``more`` keyword arguments added.

    Raises:
        UserError: the target cannot be imported, or an option is unknown or missing.
    """
    for word, kind in _WORDS.items():
        if word in spec and (wrong := misfit(spec[word], kind)) is not None:
            raise UserError(wrong.sentence(word))
    where = spec["_target_"]
    target = locate(where)
    options: dict[str, Any] = {k: v for k, v in spec.items() if k not in _WORDS} | more
    args = list(spec.get("_args_", ()))
    if spec.get("_recursive_", True):
        options = {name: build_nested(value) for name, value in options.items()}
        args = [build_nested(value) for value in args]
    partial = spec.get("_partial_", False)
    check_options(target, where, args, options, partial=partial)
    if partial:
        return functools.partial(target, *args, **options)
    try:
        return target(*args, **options)
    except UserError:
        raise
    except _REFUSALS as error:
        if not _is_installed(target):  # errors in the user's own code keep their traceback
            raise
        raise refusal(where, options, error) from error


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
            f"'package.module.Class', whose package is installed{to_install(parts[0])} or lies in "
            f"the current folder"
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


def refusal(where: str, options: Mapping[str, Any], error: Exception) -> UserError:
    """Return the message on a foreign constructor that rejects its options.

    Args:
        where: import path of the constructor.
        options: what it was called with.
        error: its exception.
    """
    given = ", ".join(f"{name}={told(value)}" for name, value in options.items()) or "no options"
    missing = next((name for name in _EXTRAS if name in str(error).lower()), "")
    cure = to_install(missing) if isinstance(error, ModuleNotFoundError) else "; correct them"
    return UserError(
        f"{where} cannot be made with {given}: {type(error).__name__}, {first_line(error)}{cure}"
    )


def to_install(package: str) -> str:
    """Return how to install an optional package; empty for other packages."""
    extra = _EXTRAS.get(package)
    return "" if extra is None else f" (pip install 'fusion-cnn[{extra}]')"


def check_options(
    target: Callable[..., Any],
    where: str,
    args: Sequence[Any],
    options: Mapping[str, Any],
    *,
    partial: bool = False,
) -> None:
    """Check that ``target`` can be called with ``args`` and ``options``; ``where`` names it.

    An option that is still a mapping with ``_target_`` is taken for what it would build.

    Raises:
        UserError: an option that the signature does not have (with the nearest that it has), a
            required one that is missing, or a value that is not what its annotation says.
    """
    try:
        signature = inspect.signature(target)
    except ValueError:  # some builtins show no signature: the call itself raises
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
    annotations = annotations_of(target)
    for option, value in options.items():
        if option in parameters and not is_target(value):
            owner = where.rpartition(".")[2]
            check_option(owner, parameters[option], annotations[option], value)


def _is_installed(target: Callable[..., Any]) -> bool:
    """Return whether a callable comes from an installed package other than this one."""
    name = getattr(target, "__module__", None) or ""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return not name.startswith("fusion.") and bool(
        {"site-packages", "dist-packages"} & set(Path(file).parts)
    )
