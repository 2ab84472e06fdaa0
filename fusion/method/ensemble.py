"""The experts of a pool as one network that answers together."""

from __future__ import annotations

from fusion.modelpool import BaseModelPool
from fusion.taskpool import Ensemble


def ensemble_of(pool: BaseModelPool) -> Ensemble:
    """Return all experts of a pool as one ensemble."""
    names = pool.model_names
    return Ensemble(
        {name: pool.load_model(name) for name in names},
        {name: pool.labels(name) for name in names},
        {name: pool.task(name) for name in names},
    )
