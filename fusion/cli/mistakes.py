"""What Hydra says about a wrong command line, told in a sentence with the cure."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from fusion.errors import UserError, suggestion

CONFIGURATION_ERRORS = (HydraException, OmegaConfBaseException)
_MISTAKE = 2  # the exit code


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


def is_configuration_error(error: BaseException) -> bool:
    """Return whether Hydra or OmegaConf complained of the configuration, not a job's own code."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__") == "fusion.program":
            return False
        frame = frame.tb_next
    return True


def explain(error: Exception, arguments: Sequence[str], config_dir: Path) -> str:
    """Return one sentence or two: what is wrong and the nearest right name."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return (
            f"{group}={name}: there is no such {group}{suggestion(name, error.options)} "
            f"(there are {', '.join(error.options)})"
        )
    if missing := re.match(r"You must specify '([^']+)'", message):
        options = re.findall(r"^\t(\S+)", message, flags=re.MULTILINE)
        return f"choose a {missing[1]}: {missing[1]}=NAME, one of {', '.join(options)}"
    if unknown := re.search(r"Could not override '([^']+)'", message):
        key = unknown[1]
        known = _known_keys(arguments, key, config_dir)
        new = " (a new option of your own is added with a plus: +" + f"{key}=VALUE)"
        hint = suggestion(key, known)
        return f"there is no option '{key}'{hint}{'' if hint else new}"
    if "parsing override" in message or "mismatched input" in message:
        told = " ".join(message.split())
        return f"an argument cannot be read: {told}; options are given as name=value"
    return " ".join(message.split())


def _known_keys(arguments: Sequence[str], wrong: str, config_dir: Path) -> list[str]:
    """Return every key of the configuration that the other arguments compose to."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    overrides = get_args_parser().parse_args(list(arguments)).overrides
    rest = [o for o in overrides if re.split(r"[=@]", o.lstrip("+~"))[0] != wrong and "," not in o]
    groups = [p.name for p in config_dir.iterdir() if p.is_dir()]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            config = compose("fusion_bench", overrides=rest)
    except CONFIGURATION_ERRORS:  # more than one thing is wrong: the groups are still known
        return groups

    return [*groups, *_keys(OmegaConf.to_container(config, resolve=False))]


def _keys(node: object, prefix: str = "") -> list[str]:
    """Return the dotted keys of nested mappings."""
    if not isinstance(node, dict):
        return []
    return [
        key for name in node for key in (f"{prefix}{name}", *_keys(node[name], f"{prefix}{name}."))
    ]
