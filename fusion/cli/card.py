"""``fusion_bench card=NAME modelpool=… to=FILE``: write the merge cards of a pool's experts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion.cli.folders import extra_folders
from fusion.cli.plain_options import flag
from fusion.errors import UserError

ALL = "all"
_OWN = ("card", "to", "images", "batch_size", "device", "overwrite")


def write_cards(arguments: Sequence[str]) -> None:
    """Write the card of one expert to a file, or those of all into a folder.

    Args:
        arguments: ``card=NAME`` or ``card=all``, ``modelpool=…`` with its overrides, ``to=PATH``
            and, if wanted, ``images=``, ``batch_size=``, ``device=``, ``overwrite=true``.

    Raises:
        UserError: an option is missing or invalid, or a card cannot be written.
    """
    own, config_dir, others = _split(arguments)
    if not own["card"] or not own.get("to"):
        raise UserError(
            "card needs an expert and a file: card=NAME modelpool=POOL to=NAME.card.safetensors "
            "(card=all to=FOLDER writes those of all experts)"
        )
    overwrite = flag(own, "overwrite", default=False)
    options: dict[str, Any] = {
        name: _number(name, own[name]) for name in ("images", "batch_size") if name in own
    }
    from fusion.cli.configuration import composed

    values = composed(others, ("modelpool", "seed"), config_dir=config_dir)

    from fusion.merging.cards import SUFFIX, check_card, write_card  # imports torch
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
    options |= {"seed": values["seed"], "device": own.get("device", "cpu")}
    for name, file in files.items():
        check_card(pool, name, file, overwrite=overwrite)
    for name, file in files.items():
        write_card(pool, name, file, overwrite=overwrite, **options)
        sys.stdout.write(f"Wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)\n")


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], Path | None, list[str]]:
    """Return the options of the card, the folder of ``--config-dir``, and the configuration's."""
    folders = extra_folders(arguments)
    own: dict[str, str] = {}
    others = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in _OWN:
            own[name] = value
        elif not name.startswith(("--config-dir", "-cd")) and Path(argument) not in folders:
            others.append(argument)
    if flags := [a for a in others if a.startswith("-")]:
        raise UserError(f"card takes no flag but --config-dir; leave {flags[0]} out")
    if not any(argument.startswith("modelpool=") for argument in others):
        raise UserError("card needs the pool that has the expert: modelpool=NAME")
    return own, folders[-1] if folders else None, others


def _number(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 2:
        raise UserError(f"{name}={value}: give a whole number of 2 or more")
    return int(value)
