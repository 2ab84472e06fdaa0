"""The mappings of a pool and its task pool by name; for the scripts of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion.cli.configuration import composed


def settings(name: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the mappings ``modelpool`` and ``taskpool`` of a pool by name, to be changed."""
    chosen = [f"modelpool={name}", f"taskpool={name}", f"seed={seed}", *overrides]
    return composed(chosen, ("modelpool", "taskpool"))


def few(dataset: dict[str, Any], n: int, seed: int) -> dict[str, Any]:
    """Return the mapping that builds ``n`` images of a data set, drawn at random."""
    return {"_target_": "fusion.data.few", "dataset": dataset, "n": n, "seed": seed}
