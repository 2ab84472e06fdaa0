"""Trusted architectures of files: networks from a short list with plain options only.

The content of a file is data, whatever its origin. A ``_target_`` is the import path of anything
that can be called, ``os.system`` included, so an architecture that a file names is compared with
this list before anything is imported. Users extend the list in their own configuration
(``Checkpoint(..., trusted=["mine.Net"])``); a file cannot.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.errors import UserError, shown
from fusion.modelpool.bare import TIMM, in_torchvision
from fusion.target import locate

OURS = ("fusion.models.CifarResNet", "fusion.models.SeparableResNet")

_TORCHVISION = re.compile(
    r"torchvision\.models\.((detection|optical_flow|segmentation|video)\.)?[a-z][a-z0-9_]*"
)
# A plain name of timm's registry. A scheme (hf-hub:, local-dir:) would read something else.
_TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_WORDS = ("_recursive_", "_convert_", "_partial_")  # of fusion.target; they build nothing
_SHOWN = 60  # characters of a name or value from a file that a message shows


def require_trusted(
    spec: object, *, path: Path | str, size: int, trusted: Sequence[str] = ()
) -> dict[str, Any]:
    """Check the architecture that a file requests, without importing anything.

    The target is one of this package's networks, a name below ``torchvision.models`` that looks
    like a builder's, ``timm.create_model`` or a target that the user trusts. Options are numbers,
    strings, booleans, null and lists of those; no option makes a constructor read other files or
    the network. A number is at most the size of the file in bytes: counted items (channels,
    classes, blocks) take at least one byte each, so that a greater number cannot fit and would only
    cost time and memory.

    Args:
        spec: the mapping in the file, as JSON types.
        path: the file, for messages.
        size: its size in bytes.
        trusted: further targets, by their exact import path, that the user allows.

    Returns:
        ``spec``.

    Raises:
        UserError: the file requests anything else.
    """
    target = spec.get("_target_") if isinstance(spec, Mapping) else None
    if not isinstance(spec, Mapping) or not isinstance(target, str):
        raise _refusal(path, spec, "which names no _target_")
    known = target in OURS or target == TIMM or target in trusted
    if not known and not _TORCHVISION.fullmatch(target):
        allowed = f"{', '.join(OURS)}, {TIMM} and networks of torchvision.models"
        raise _refusal(path, target, f"and a file may only name {allowed}")
    args = spec.get("_args_", [])
    options = {key: value for key, value in spec.items() if key not in ("_target_", "_args_")}
    if not isinstance(args, list):
        raise _refusal(path, target, "with '_args_' that are no list")
    if options.get("_partial_"):
        raise _refusal(path, target, "with '_partial_', which makes no network")
    for word in _WORDS:
        options.pop(word, None)
    for name, value in [*options.items(), *(("_args_", value) for value in args)]:
        if odd := _odd(value, size):
            raise _refusal(path, target, f"with {_short(name)} = {_short(value)}, {odd}")
    if target not in trusted:
        if in_torchvision(target) and (odd := _reads_torchvision(args, options)):
            raise _refusal(path, target, odd)
        if target == TIMM and (odd := _reads_timm(args, options)):
            raise _refusal(path, target, odd)
    return dict(spec)


def require_registered(
    spec: Mapping[str, Any], *, path: Path | str, trusted: Sequence[str] = ()
) -> None:
    """Check that a network of torchvision or timm is one that their registries can build.

    Below ``torchvision.models`` there are other functions too, which read files or weights.

    Raises:
        UserError: it is not, or the package is not installed.
    """
    target = str(spec["_target_"])
    if target in trusted:
        return
    if in_torchvision(target):
        from torchvision import models

        package, _, name = target.rpartition(".")
        found = getattr(importlib.import_module(package), name, None)
        if name not in models.list_models() or models.get_model_builder(name) is not found:
            raise _refusal(path, target, "which is no network that torchvision registers")
    if target == TIMM:
        locate(target)  # says what is missing where timm is not installed
        import timm

        name = str(spec.get("model_name") or spec["_args_"][0]).partition(".")[0]
        if not timm.is_model(name):
            raise _refusal(path, name, "which is no network that timm registers")


def _odd(value: object, size: int) -> str:
    """Return why a value is not a plain option, or an empty string."""
    if isinstance(value, list):
        return next((odd for item in value if (odd := _odd(item, size))), "")
    if value is None or isinstance(value, bool | str):
        return ""
    if not isinstance(value, int | float):
        return "which is no plain number, string, boolean, null or list of those"
    if isinstance(value, float) and not math.isfinite(value):
        return "which is no finite number"
    return f"more than the file's {size} bytes can hold" if abs(value) > size else ""


def _reads_torchvision(args: list[Any], options: Mapping[str, Any]) -> str:
    """Return why a builder of torchvision would read weights from elsewhere, or an empty string."""
    if args:
        return "with '_args_'; the options of torchvision's networks have names"
    for name in options:
        if name.startswith(("weights", "pretrained")) and options[name]:
            return f"with {_short(name)} = {_short(options[name])}, other weights than its own"
    return ""


def _reads_timm(args: list[Any], options: Mapping[str, Any]) -> str:
    """Return why ``timm.create_model`` would read files or the network, or an empty string."""
    name = options.get("model_name", args[0] if args else None)
    if len(args) > 1 or (args and "model_name" in options):
        return "with further '_args_'; the options of timm's networks have names"
    if not isinstance(name, str) or not _TIMM_NAME.fullmatch(name):
        return f"with the model_name {_short(name)}, which is no plain name"
    for option in options:
        if option.startswith(("pretrained", "checkpoint", "cache")) and options[option]:
            return f"with {_short(option)} = {_short(options[option])}, other weights than its own"
    return ""


def _refusal(path: Path | str, asked: object, why: str) -> UserError:
    return UserError(
        f"'{path}' asks for the architecture {_short(asked)}, {why}; "
        f"give `architecture` yourself if you trust it"
    )


def _short(value: object) -> str:
    """A value from a file as one line of bounded length; deep nesting is not walked."""
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a number of many digits"  # Python refuses to print more than 4300 of them
    return shown(repr(value), _SHOWN)
