"""Compose a configuration without a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose

from fusion.cli.arguments import checked_arguments
from fusion.cli.composing import composing
from fusion.cli.folders import extra_folders
from fusion.cli.job import plain_values, register_resolvers
from fusion.cli.mistakes import explaining
from fusion.cli.yaml_files import check_files
from fusion.config_folder import config_folder
from fusion.errors import UserError

_PRIMARY = "fusion_bench"


def composed(
    overrides: Sequence[str], keys: Sequence[str], *, config_dir: str | Path | None = None
) -> dict[str, Any]:
    """Return some entries of the configuration that a command composes, references resolved.

    Args:
        overrides: choices and settings, as for ``fusion_bench``; without a pool of models the
            configuration has none.
        keys: names of the entries, such as ``modelpool``.
        config_dir: a folder of custom YAML, as for ``--config-dir``.

    Raises:
        UserError: a choice or setting does not exist, or a value is missing.
    """
    folder = config_folder()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"config_dir: there is no folder '{config_dir}'; give one with YAML files")
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"overrides: '{text}' is a flag of the command; give name=value")
    arguments = checked_arguments([*flags, *overrides], folder)
    extra = extra_folders(arguments)
    check_files(extra, arguments)
    register_resolvers()
    settings = [a for a in arguments if a not in flags]
    if not any(a.startswith(("modelpool=", "setting=")) for a in settings):
        settings.append("~modelpool")
    if extra:
        settings.append(f"hydra.searchpath=[{','.join(f'file://{f.absolute()}' for f in extra)}]")
    with explaining(arguments, folder):
        with composing(folder):
            config = compose(_PRIMARY, overrides=settings)
        for key in keys:
            if key not in config:
                raise UserError(f"the configuration has no {key}; choose one: {key}=NAME")
        return plain_values(config, keys)
