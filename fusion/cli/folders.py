"""Folders of YAML files: the shipped one, and those of the user."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path


def extra_folders(arguments: Sequence[str]) -> list[Path]:
    """Return the folders that ``--config-dir`` names."""
    given = [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    flags = ("--config-dir", "-cd")
    given += [value for flag, value in itertools.pairwise(arguments) if flag in flags]
    return [Path(folder) for folder in given]


def choices(group: str, folders: Sequence[Path]) -> list[str]:
    """Return the names that a group has in the folders of YAML."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
