"""One operation with labels in place of its tensors, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusion.alignment.labels import Labels
from fusion.alignment.ledger import Ledger
from fusion.alignment.nested import flat


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of ATen.

    Attributes:
        name: Its name without the overload.
        run: The function that computes it.
        arguments: By name, labels in place of tensors; constants of which the value is known
            (indices) are tensors.
        shapes: Of the tensors that it returns.
        used: Of each, whether anything reads it.
        strides: Those of the first tensor among the arguments, and its offset in memory.
        why: Its description as a reason.
        ledger: Takes its demands.
    """

    name: str
    run: Callable[..., Any]
    arguments: Mapping[str, Any]
    shapes: tuple[torch.Size, ...]
    used: tuple[bool, ...]
    strides: tuple[tuple[int, ...], int]
    why: str
    ledger: Ledger

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def shape(self) -> torch.Size:
        """Shape of the first tensor that it returns."""
        return self.shapes[0]

    def labels(self) -> list[Labels]:
        """Return the labels of every tensor among the arguments, in order."""
        return [part for part in flat(dict(self.arguments)) if isinstance(part, Labels)]


Rule = Callable[[Operation], "Labels | tuple[Labels, ...] | None"]
"""States what an operation demands; ``None``: nothing can be proven, so all must stay in place."""
