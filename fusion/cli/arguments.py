"""Convert arguments to Hydra's form, and check them before any file is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from fusion.annotations import told
from fusion.cli.folders import choices, extra_folders
from fusion.errors import UserError, shown, suggestion

_NEEDED = {
    "method": "method=dummy merges nothing",
    "modelpool": "choose one: modelpool=NAME",
    "fabric": "fabric=auto takes the best device",
    "path": "path=default is the only one that is shipped",
}
# Hydra's settings by which it would write into the run folder.
_FIXED = {"hydra.output_subdir": None, "hydra.job_logging.handlers.file.delay": True}
# Meaning of null for an optional group.
_NOTHING = {
    "taskpool": "~taskpool",
    "merge": "~merge",
    "experiment": "~experiment",
    "finetune": "finetune=none",
    "fabric/loggers": "fabric/loggers=none",
}


def checked_arguments(arguments: Sequence[str], config_folder: Path) -> list[str]:
    """Return the arguments as Hydra reads them: flags first, ``taskpool=null`` as ``~taskpool``.

    Args:
        arguments: as typed by the user.
        config_folder: where the shipped YAML is.

    Raises:
        UserError: an unknown flag or one without its value, a group that a run needs and that is
            null, or a choice that is no name.
    """
    flags, overrides = _split(arguments)
    folders = [config_folder, *extra_folders(flags)]
    kept = []
    for text in overrides:
        override = _parsed(text)
        name = text.lstrip("~").partition("=")[0]
        if text.startswith("~") and name in _NEEDED:
            raise UserError(f"{text}: a run needs a {name}; {_NEEDED[name]}")
        if override is not None and name in _FIXED and override.value() is not _FIXED[name]:
            raise UserError(f"{text}: the program writes the run folder itself; leave that out")
        kept.append(text if override is None else _checked_choice(text, override, folders))
    return [*flags, *kept]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return flags (with their values) and overrides, which Hydra cannot read when they mix.

    Raises:
        UserError: a flag is unknown, or lacks its value.
    """
    parser = get_args_parser()
    actions = {flag: action for action in parser._actions for flag in action.option_strings}

    def complain(message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        hint = suggestion(unknown[1], actions) if unknown else ""
        raise UserError(f"{message}{hint} (fusion_bench --help lists what there is)")

    parser.error = complain  # type: ignore[method-assign]
    flags: list[str] = []
    overrides: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        action = actions.get(argument)
        if action is not None and action.nargs is None:
            flags += [value for value in [next(waiting, None)] if value is not None]
    parser.parse_args(flags)
    return flags, overrides


def _parsed(text: str) -> Override | None:
    """Return an override in Hydra's form; errors in reading it are left to Hydra."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise UserError(
            f"{shown(text)}: the number has too many digits; give a smaller one"
        ) from error


def _checked_choice(text: str, override: Override, folders: Sequence[Path]) -> str:
    """Return an override; one of a group only if it names a choice."""
    group = override.key_or_group
    names = choices(group, folders)
    if not names or override.is_sweep_override() or override.is_delete():
        return text
    value: Any = override.value()
    value = value.text if isinstance(value, QuotedString) else value
    if value is None and group in _NOTHING:
        return _NOTHING[group]
    if value is None and group in _NEEDED:
        raise UserError(f"{text}: a run needs a {group}; {_NEEDED[group]}")
    if isinstance(value, str) and value:  # Hydra checks whether it exists
        return text
    raise UserError(
        f"{group} is {told(value)}; give the name of one (there are {', '.join(names)})"
    )
