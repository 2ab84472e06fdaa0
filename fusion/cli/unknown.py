"""Messages on unknown options, with the likely intended option."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion.cli.composing import composing
from fusion.cli.folders import extra_folders
from fusion.elsewhere import OPTIONS
from fusion.errors import suggestion

_UNREADABLE = (HydraException, OmegaConfBaseException, ValueError, TypeError)
_MOST = 3  # maximum number of places named where several have an option


def no_option(key: str, arguments: Sequence[str], config_folder: Path) -> str:
    """Return the mistake in the option ``key``, and the existing alternatives."""
    given = get_args_parser().parse_args(list(arguments))
    known = known_values(given.overrides, key, config_folder, extra_folders(arguments))
    if (reference := through_reference(key, known)) is not None:
        return reference
    parts = key.split(".")
    depth = next((d for d in range(len(parts)) if ".".join(parts[: d + 1]) not in known), 0)
    owner, wrong = ".".join(parts[:depth]), parts[depth]
    sentence = f"{owner or 'the configuration'} has no option '{wrong}'"
    if depth == len(parts) - 1 and (elsewhere := _elsewhere(owner, wrong, known)):
        return sentence + elsewhere
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == owner]
    cure = suggestion(wrong, siblings)
    if not cure and siblings:
        cure = f"; it has {', '.join(siblings)}"
        if owner:
            cure += f" (an option of your own is added with a plus: +{key}=VALUE)"
    return sentence + cure


def through_reference(key: str, known: Mapping[str, Any]) -> str | None:
    """Return the sentence on an option below a node that only refers to another one.

    Setting it would replace the reference by a mapping of that option alone.
    """
    parts = key.split(".")
    for depth in range(1, len(parts)):
        owner, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
        found = re.fullmatch(r"\$\{([\w.]+)\}", str(known.get(owner, "")))
        if found is not None:
            return (
                f"{owner} is the same as {found[1]}, so {rest} cannot be set for it alone; set "
                f"{found[1]}.{rest}=VALUE for both, or give the whole: "
                f"'{owner}={{_target_:…,{rest}:VALUE}}'"
            )
    return None


def known_values(
    overrides: Sequence[str], without: str, config_folder: Path, extra: Sequence[Path]
) -> dict[str, Any]:
    """Return key → value, references unresolved, of what the other overrides compose to.

    Args:
        overrides: choices and settings.
        without: the omitted option.
        config_folder: where the shipped YAML is.
        extra: the folders that a user adds.
    """
    found: dict[str, Any] = {
        str(p.relative_to(config_folder)): None for p in config_folder.rglob("*") if p.is_dir()
    }
    try:
        config = _composed([o for o in overrides if _key(o) != without], config_folder, extra)
        _add(found, OmegaConf.to_container(config, resolve=False), "")
    except _UNREADABLE:  # more than one thing is wrong: the groups are still known
        pass
    return found


def composition_error(arguments: Sequence[str], config_folder: Path) -> Exception | None:
    """Return what is wrong with the arguments apart from the values of a sweep, if anything."""
    overrides = get_args_parser().parse_args(list(arguments)).overrides
    try:
        _composed(overrides, config_folder, extra_folders(arguments))
    except _UNREADABLE as error:
        return error
    return None


def _composed(overrides: Sequence[str], config_folder: Path, extra: Sequence[Path]) -> DictConfig:
    rest = [o for o in overrides if "," not in o]
    if extra:
        folders = ",".join(f"file://{folder.absolute()}" for folder in extra)
        rest.append(f"hydra.searchpath=[{folders}]")
    with composing(config_folder):
        return compose("fusion_bench", overrides=rest, return_hydra_config=True)


def _key(override: str) -> str:
    return re.split(r"[=@]", override.lstrip("+~"))[0]


def _elsewhere(owner: str, wrong: str, known: Mapping[str, Any]) -> str:
    """Return where an option is that was given at the wrong place or by another project's name."""
    group = owner.partition(".")[0]
    for name in (wrong, OPTIONS.get(wrong)):
        places = [key for key in known if name is not None and key.endswith(f".{name}")]
        places = [key for key in places if not key.startswith("hydra.")]
        near = [key for key in places if group and key.startswith(f"{group}.")]
        found = near or ([] if group else places)
        if found and len(found) <= _MOST:
            return f"; here it is {' or '.join(f'{key}=VALUE' for key in found)}"
    return ""


def _add(found: dict[str, Any], node: object, prefix: str) -> None:
    if isinstance(node, dict):
        for name, value in node.items():
            found[f"{prefix}{name}"] = value
            _add(found, value, f"{prefix}{name}.")
