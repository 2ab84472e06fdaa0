"""``fusion_bench card=NAME modelpool=… to=FILE``: write the merge cards of a pool's experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.cli.arguments import checked_arguments
from fusion.cli.folders import extra_folders
from fusion.cli.mistakes import explaining
from fusion.cli.yaml_files import check_files
from fusion.config_folder import config_folder
from fusion.errors import UserError

ALL = "all"
_OWN = ("card", "to", "images", "batch_size", "device", "overwrite")
_PRIMARY = "fusion_bench"


def write_cards(arguments: Sequence[str]) -> None:
    """Write the card of one expert to a file, or those of all into a folder.

    Args:
        arguments: ``card=NAME`` or ``card=all``, ``modelpool=…`` with its overrides, ``to=PATH``
            and, if wanted, ``images=``, ``batch_size=``, ``device=``, ``overwrite=true``.

    Raises:
        UserError: an option is missing or has no meaning, or a card cannot be written.
    """
    own, others = _split(arguments)
    if not own["card"] or not own.get("to"):
        raise UserError(
            "card needs an expert and a file: card=NAME modelpool=POOL to=NAME.card.safetensors "
            "(card=all to=FOLDER writes those of all experts)"
        )
    if own.get("overwrite", "false") not in ("true", "false"):
        raise UserError(f"overwrite={own['overwrite']}: give true or false")
    options: dict[str, Any] = {
        name: _number(name, own[name]) for name in ("images", "batch_size") if name in own
    }
    values = _composed(others)

    from fusion.merging.cards import SUFFIX, check_card, write_card  # from here torch is paid for
    from fusion.modelpool import BaseModelPool
    from fusion.target import build

    pool = build(values["modelpool"])
    if not isinstance(pool, BaseModelPool):
        raise UserError(f"modelpool must be a BaseModelPool, not a {type(pool).__name__}")
    one = own["card"] != ALL or ALL in pool
    names = [own["card"]] if one else pool.model_names
    files = {
        name: Path(own["to"]) if one else Path(own["to"]) / f"{name}{SUFFIX}" for name in names
    }
    overwrite = own.get("overwrite") == "true"
    options |= {"seed": values["seed"], "device": own.get("device", "cpu")}
    for name, file in files.items():
        check_card(pool, name, file, overwrite=overwrite)
    for name, file in files.items():
        write_card(pool, name, file, overwrite=overwrite, **options)
        sys.stdout.write(f"Wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)\n")


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options of the card, and those of the configuration."""
    own: dict[str, str] = {}
    others = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in _OWN:
            own[name] = value
        else:
            others.append(argument)
    flags = [a for a in others if a.startswith("-") and not a.startswith(("--config-dir", "-cd"))]
    if flags:
        raise UserError(f"card takes no flag but --config-dir; leave {flags[0]} out")
    if not any(argument.startswith("modelpool=") for argument in others):
        raise UserError("card needs the pool that has the expert: modelpool=NAME")
    return own, others


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 2:
        raise UserError(f"{name}={value}: give a whole number of 2 or more")
    return int(value)


def _composed(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Return the pool and the seed that the arguments describe, in plain values."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from fusion.cli.job import register_resolvers

    folder = config_folder()
    checked = checked_arguments(arguments, folder)
    folders = extra_folders(checked)
    check_files(folders, checked)
    register_resolvers()
    overrides = [a for a in checked if not a.startswith("-") and Path(a) not in folders]
    found = ",".join(f"file://{path.resolve()}" for path in folders)
    with explaining(checked, folder), initialize_config_dir(str(folder), version_base="1.3"):
        config = compose(
            _PRIMARY, [*overrides, *([f"hydra.searchpath=[{found}]"] if found else [])]
        )
        return {
            key: OmegaConf.to_container(config[key], resolve=True, throw_on_missing=True)
            if OmegaConf.is_config(config[key])
            else config[key]
            for key in ("modelpool", "seed")
        }
