"""Use Hydra's compose API while another Hydra may be running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra


@contextmanager
def composing(config_folder: Path) -> Iterator[None]:
    """Let ``hydra.compose`` read ``config_folder``; a running Hydra is restored afterwards."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder), version_base="1.3"):
            yield
    finally:  # Hydra replaces the existing instance
        GlobalHydra.instance().hydra = running
