"""A pool and its task pool by name, as the command builds them; for the scripts of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fusion.cli.job import register_resolvers
from fusion.config_folder import config_folder


def composed(
    overrides: Sequence[str], keys: Sequence[str], config_dir: Path | None = None
) -> dict[str, Any]:
    """Return some mappings of the configuration that a command composes, references resolved.

    Args:
        overrides: what is chosen and set, as for ``fusion_bench``.
        keys: names of the mappings.
        config_dir: where the YAML lies; the shipped one by default.
    """
    register_resolvers()
    with initialize_config_dir(str((config_dir or config_folder()).resolve()), version_base="1.3"):
        config = compose("fusion_bench", overrides=list(overrides))
    return {key: OmegaConf.to_container(config[key], resolve=True) for key in keys}


def settings(name: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the mappings ``modelpool`` and ``taskpool`` of a pool by name."""
    chosen = [f"modelpool={name}", f"taskpool={name}", f"seed={seed}", *overrides]
    return composed(chosen, ("modelpool", "taskpool"))


def few(dataset: dict[str, Any], n: int, seed: int) -> dict[str, Any]:
    """Return the mapping that builds ``n`` images of a data set, drawn at random."""
    return {"_target_": "fusion.data.few", "dataset": dataset, "n": n, "seed": seed}
