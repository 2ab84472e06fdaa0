"""Translate Hydra's errors on a wrong command line to one sentence with the remedy."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from fusion.cli.folders import choices, extra_folders
from fusion.cli.unknown import composition_error, known_values, no_option
from fusion.cli.yaml_files import default_place, first_fault
from fusion.elsewhere import choice_hint
from fusion.errors import UserError, shown, suggestion

# Exceptions of Hydra, OmegaConf, PyYAML and Python's logging on an unreadable configuration.
CONFIGURATION_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    UnicodeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    RecursionError,
)
_OWN_TELLING = (HydraException, OmegaConfBaseException)
_MISTAKE = 2  # the exit code
_LONGEST = 300  # characters of a foreign message
_CURES = {  # refusals of the file system or the operating system
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "make room, or choose a folder on another disk",
    errno.EDQUOT: "make room, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def tell(error: UserError) -> NoReturn:
    """Print the message and exit with 2; the traceback is printed only on request."""
    if os.environ.get("FUSION_DEBUG") == "1":
        raise error
    sys.stderr.write(f"fusion_bench: error: {error}\n")
    sys.exit(_MISTAKE)


def limit_of_machine(error: OSError) -> UserError | None:
    """Return the sentence on a limit of the machine that was reached, or ``None``."""
    cure = _CURES.get(error.errno or 0)
    if cure is None:
        return None
    where = f"'{shown(str(error.filename))}': " if error.filename else ""
    return UserError(f"{where}{error.strerror}; {cure}")


@contextmanager
def explaining(arguments: Sequence[str], folder: Path) -> Iterator[None]:
    """Convert Hydra's exceptions on a wrong command line within the block to one sentence.

    Args:
        arguments: as typed by the user.
        folder: where the shipped YAML is.

    Raises:
        UserError: instead of an error of the configuration, or of making the run folder.
    """
    try:
        yield
    except UserError:
        raise
    except CONFIGURATION_ERRORS as error:
        if not is_configuration_error(error):
            raise
        raise UserError(explain(error, arguments, folder)) from error
    except OSError as error:
        if not is_from_making_a_folder(error):
            raise
        raise UserError(
            f"output_path: cannot make the run folder '{error.filename}' ({error.strerror}); "
            f"choose a folder that you may write to"
        ) from error


def is_configuration_error(error: BaseException) -> bool:
    """Return whether it was raised while Hydra read the configuration, not by a job's own code."""
    modules = [
        str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    if isinstance(error, _OWN_TELLING):
        return "fusion.program" not in modules
    # Any other error inside this package keeps its traceback.
    return not modules[-1].startswith("fusion.") and "fusion.cli.job" not in modules


def is_from_making_a_folder(error: BaseException) -> bool:
    """Return whether it was raised while Hydra made a run's folder."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code.co_name == "mkdir" and is_configuration_error(error)


def explain(error: Exception, arguments: Sequence[str], config_folder: Path) -> str:
    """Return one or two sentences: the mistake and the nearest valid name."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException):
        return _no_choice(error, arguments, config_folder)
    if missing := re.match(r"You must specify '([^']+)'", message):
        options = re.findall(r"^\t(\S+)", message, flags=re.MULTILINE)
        for first in options[:1]:  # with any choice: an experiment may make it for each job
            chosen = [*arguments, f"{missing[1]}={first}"]
            other = composition_error(chosen, config_folder)
            if other is not None and f"'{missing[1]}." not in str(other):
                return explain(other, chosen, config_folder)
        return f"choose a {missing[1]}: {missing[1]}=NAME, one of {', '.join(options)}"
    if unknown := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", message):
        key, at, _ = unknown[1].partition("@")
        where = default_place(extra_folders(arguments), key) if at else None
        prefix = "" if where is None else f"{where}: "
        return prefix + no_option(key, arguments, config_folder)
    if isinstance(error, OverrideParseException):
        return (
            f"the argument '{shown(str(error.override))}' cannot be read; options are given as "
            f"name=value, and a value with special characters in quotes: 'name=\"a=b, c\"'"
        )
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]+)=([^']+)'", message):
        key, value = ambiguous.groups()
        return (
            f"{key}={value}: several values; to run a job for each, add --multirun; "
            f"to give them as one list, write {key}=[{value}]"
        )
    if (wrong := first_fault(extra_folders(arguments))) is not None:
        return wrong
    if isinstance(error, RecursionError):
        return "defaults: a YAML file names itself in its defaults, or another that names it back"
    if isinstance(error, InterpolationKeyError):
        return _no_reference(error, arguments, config_folder)
    if isinstance(error, GrammarParseError | InterpolationResolutionError):
        where = error.full_key or "a value"
        if used := re.search(r"dereferencing interpolation '\$\{([\w.]+)\}': ([^\n]+)", message):
            return f"{used[1]} cannot be used in {where} ({_cleaned(used[2])}); give text"
        return f"{where}: its reference cannot be resolved ({_cleaned(message)})"
    if isinstance(error, InstantiationException):
        return f"hydra.callbacks: {_cleaned(message)}; give mappings with _target_"
    if _is_from_logging(error):
        return f"hydra.job_logging or hydra.hydra_logging: {_cleaned(message)}; leave them out"
    where = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) else ""
    where = "" if where == "None: " else where
    return f"{where}{_cleaned(message) or type(error).__name__}; correct it or leave it out"


def _no_choice(error: MissingConfigException, arguments: Sequence[str], config_folder: Path) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    extra = extra_folders(arguments)
    if not group and any(a.startswith(("--config-name", "-cn")) for a in arguments):
        return f"--config-name: there is no configuration '{name}'; leave the flag out"
    known = error.options or choices(group, [config_folder, *extra])
    there = f"there are {', '.join(known)}" if known else "there are none"
    where = default_place(extra, name)
    told = f"{group}={name}" if where is None else f"{where}: the default {group}={name}"
    return f"{told}: there is no such {group}{choice_hint(name, known)} ({there})"


def _no_reference(
    error: InterpolationKeyError, arguments: Sequence[str], config_folder: Path
) -> str:
    found = re.search(r"[Ii]nterpolation key '([^']+)' not found", str(error))
    wanted = found[1] if found else "?"
    overrides = get_args_parser().parse_args(list(arguments)).overrides
    known = known_values(overrides, "", config_folder, extra_folders(arguments))
    return (
        f"{error.full_key} refers to '${{{wanted}}}', which the configuration does not have"
        f"{suggestion(wanted, known)}"
    )


def _is_from_logging(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "configure_log" for frame, _ in frames)


def _cleaned(message: str) -> str:
    """Return a foreign message in one line, without advice on foreign settings."""
    lines = [
        line
        for line in message.splitlines()
        if not re.match(r"\s*(full_key|object_type|reference_type|See https?|Set the env)", line)
    ]
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"(, set env var|Set the environment variable) HYDRA_FULL_ERROR=1.*", "", text)
    return shown(text, _LONGEST)
