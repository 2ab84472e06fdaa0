"""Location of the YAML files of this package."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> Path:
    """Return the folder of the shipped YAML files: the wheel's own, or the checkout's."""
    package = Path(__file__).resolve().parent
    shipped = package / "config"
    return shipped if shipped.is_dir() else package.parent / "config"
