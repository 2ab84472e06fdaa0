"""What Hydra says about a wrong command line, told in a sentence with the cure."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from fusion.errors import UserError, suggestion

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)
_MISTAKE = 2  # the exit code
_NEEDED = {
    "method": "method=dummy merges nothing",
    "modelpool": "choose one: modelpool=NAME",
    "fabric": "fabric=auto takes the best device",
}


def tell(error: UserError) -> NoReturn:
    """Print the one sentence and leave with 2; the traceback is for whoever asks for it."""
    if os.environ.get("FUSION_DEBUG") == "1":
        raise error
    sys.stderr.write(f"fusion_bench: error: {error}\n")
    sys.exit(_MISTAKE)


def check_flags(arguments: Sequence[str]) -> None:
    """Check the arguments that begin with a dash.

    Raises:
        UserError: one of them is unknown, or lacks its value.
    """
    parser = get_args_parser()

    def complain(message: str) -> Any:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = suggestion(unknown[1], flags) if unknown else ""
        raise UserError(f"{message}{hint} (fusion_bench --help lists what there is)")

    parser.error = complain  # type: ignore[method-assign]
    parser.parse_args(list(arguments))


def without_null(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``taskpool=null`` as Hydra writes it: ``~taskpool``.

    Raises:
        UserError: a group without which there is no run is set to null.
    """
    for group, cure in _NEEDED.items():
        for argument in (f"{group}=null", f"~{group}"):
            if argument in arguments:
                raise UserError(f"{argument}: a run needs a {group}; {cure}")
    return ["~taskpool" if argument == "taskpool=null" else argument for argument in arguments]


def is_configuration_error(error: BaseException) -> bool:
    """Return whether it was raised while Hydra read the configuration, not by a job's own code."""
    return all(
        frame.f_globals.get("__name__") != "fusion.program"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def is_from_making_a_folder(error: BaseException) -> bool:
    """Return whether it was raised while Hydra made a run's folder."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code.co_name == "mkdir" and is_configuration_error(error)


def explain(error: Exception, arguments: Sequence[str], config_dir: Path) -> str:
    """Return one sentence or two: what is wrong and the nearest right name."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not group:
            return f"--config-name: there is no primary configuration '{name}'; leave the flag out"
        return (
            f"{group}={name}: there is no such {group}{suggestion(name, error.options or ())} "
            f"(there are {', '.join(error.options or ())})"
        )
    if missing := re.match(r"You must specify '([^']+)'", message):
        options = re.findall(r"^\t(\S+)", message, flags=re.MULTILINE)
        return f"choose a {missing[1]}: {missing[1]}=NAME, one of {', '.join(options)}"
    if unknown := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", message):
        return _no_option(unknown[1], _known_keys(arguments, unknown[1], config_dir))
    if isinstance(error, OverrideParseException):
        return (
            f"the argument '{error.override}' cannot be read; options are given as name=value, "
            f"and a value with special characters in quotes: 'name=\"a=b, c\"'"
        )
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]+)=([^']+)'", message):
        key, value = ambiguous.groups()
        return (
            f"{key}={value}: several values; to run a job for each, add --multirun; "
            f"to give them as one list, write {key}=[{value}]"
        )
    return " ".join(message.split())


def _no_option(key: str, known: Sequence[str]) -> str:
    """Return the sentence on an unknown ``key``: where it goes wrong, and what there is instead."""
    parts = key.split(".")
    depth = next((d for d in range(len(parts)) if ".".join(parts[: d + 1]) not in known), 0)
    owner, wrong = ".".join(parts[:depth]), parts[depth]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == owner]
    cure = suggestion(wrong, siblings)
    if not cure and siblings:
        cure = f"; it has {', '.join(siblings)}"
        if owner:
            cure += f" (an option of your own is added with a plus: +{key}=VALUE)"
    return f"{owner or 'the configuration'} has no option '{wrong}'{cure}"


def _known_keys(arguments: Sequence[str], wrong: str, config_dir: Path) -> list[str]:
    """Return every key of the configuration that the other arguments compose to."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    given = get_args_parser().parse_args(list(arguments))
    overrides = without_null(given.overrides)
    rest = [o for o in overrides if re.split(r"[=@]", o.lstrip("+~"))[0] != wrong and "," not in o]
    groups = [str(p.relative_to(config_dir)) for p in config_dir.rglob("*") if p.is_dir()]
    if given.config_dir:
        rest.append(f"hydra.searchpath=[file://{Path(given.config_dir).absolute()}]")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            config = compose("fusion_bench", overrides=rest, return_hydra_config=True)
    except CONFIGURATION_ERRORS:  # more than one thing is wrong: the groups are still known
        return groups

    keys = _keys(OmegaConf.to_container(config, resolve=False))
    return list(dict.fromkeys([*groups, *keys]))


def _keys(node: object, prefix: str = "") -> list[str]:
    """Return the dotted keys of nested mappings."""
    if not isinstance(node, dict):
        return []
    return [
        key for name in node for key in (f"{prefix}{name}", *_keys(node[name], f"{prefix}{name}."))
    ]
