"""Merging convolutional networks: pools, algorithms and results.

The public names are resolved on first use, so that ``import fusion`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.cli.pools import load_modelpool, load_taskpool, pools
    from fusion.errors import UserError
    from fusion.merging.cards import write_card
    from fusion.method.base import BaseAlgorithm
    from fusion.method.presets import merge, methods
    from fusion.modelpool.base import BaseModelPool
    from fusion.modelpool.checkpoint import load
    from fusion.taskpool.base import BaseTaskPool

__version__ = "0.1.0"
__all__ = [
    "BaseAlgorithm",
    "BaseModelPool",
    "BaseTaskPool",
    "UserError",
    "__version__",
    "load",
    "load_modelpool",
    "load_taskpool",
    "merge",
    "methods",
    "pools",
    "write_card",
]

_HOMES = {
    "BaseAlgorithm": "fusion.method.base",
    "BaseModelPool": "fusion.modelpool.base",
    "BaseTaskPool": "fusion.taskpool.base",
    "UserError": "fusion.errors",
    "load": "fusion.modelpool.checkpoint",
    "load_modelpool": "fusion.cli.pools",
    "load_taskpool": "fusion.cli.pools",
    "merge": "fusion.method.presets",
    "methods": "fusion.method.presets",
    "pools": "fusion.cli.pools",
    "write_card": "fusion.merging.cards",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusion' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
