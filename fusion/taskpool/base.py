"""A pool of tasks: what measures a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class BaseTaskPool(ABC):
    """Subclass this, write ``evaluate``, and name the class as a task pool's ``_target_``.

    Attributes:
        evaluate_members: whether a program also evaluates the pool's members, to set them beside
            the merged model in the report.
        fabric: the Lightning Fabric to evaluate under; ``None`` evaluates where the model is.
        progress: whether to show progress bars; ``None`` shows them where there is a terminal.
    """

    evaluate_members: bool = False
    fabric: Fabric | None = None
    progress: bool | None = None

    @abstractmethod
    def evaluate(self, model: nn.Module, *, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Return task → metric → number for ``model``, which is left as it was.

        Args:
            model: the network to measure.
            classes: the original labels that the model's outputs stand for, in their order;
                ``None`` means 0, 1, 2, …
        """

    def check(self) -> None:
        """Check, before any work, that the tasks can be evaluated; nothing by default.

        Raises:
            UserError: says what is wrong and the cure.
        """
