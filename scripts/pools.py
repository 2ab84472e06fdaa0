"""A pool and its task pool by name, as the command builds them; for the scripts of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fusion.cli.job import register_resolvers
from fusion.config_folder import config_folder


def settings(name: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the mappings ``modelpool`` and ``taskpool`` of these choices, references resolved."""
    register_resolvers()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        chosen = [f"modelpool={name}", f"taskpool={name}", f"seed={seed}", *overrides]
        config = compose("fusion_bench", overrides=chosen)
    return {
        key: OmegaConf.to_container(config[key], resolve=True) for key in ("modelpool", "taskpool")
    }
