"""Base class of task pools, which measure networks."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion.labels import LabelSpace

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Contestant:
    """A network that is measured together with others.

    Attributes:
        load: builds the network when it is needed.
        labels: the classes of its outputs; a :class:`~fusion.models.MultiTaskNetwork` states its
            classes itself.
    """

    load: Callable[[], nn.Module]
    labels: LabelSpace | None = None


class BaseTaskPool(ABC):
    """Subclass this, write ``evaluate``, and name the class as a task pool's ``_target_``.

    Attributes:
        evaluate_members: whether a program also evaluates the pool's members, so that the report
            compares them with the merged model.
        fabric: the Lightning Fabric to evaluate under; ``None`` evaluates where the model is.
        progress: whether to show progress bars; ``None`` shows them where there is a terminal.
    """

    evaluate_members: bool = False
    fabric: Fabric | None = None
    progress: bool | None = None

    @abstractmethod
    def evaluate(self, model: nn.Module, *, labels: LabelSpace | None = None) -> dict[str, Any]:
        """Return task → metric → number for ``model``, which is not changed.

        A subclass that needs no labels may leave the argument out.

        Args:
            model: the network to measure.
            labels: the classes of the model's outputs; ``None`` where they are unknown.
        """

    def evaluate_all(self, contestants: Mapping[str, Contestant]) -> dict[str, dict[str, Any]]:
        """Return name → result of :meth:`evaluate`, one network after the other."""
        takes_labels = "labels" in inspect.signature(self.evaluate).parameters
        found = {}
        for name, contestant in contestants.items():
            options: dict[str, Any] = {"labels": contestant.labels} if takes_labels else {}
            found[name] = self.evaluate(contestant.load(), **options)
        return found

    def check(self) -> None:
        """Check, before any work, that the tasks can be evaluated; nothing by default.

        Raises:
            UserError: a task cannot be evaluated.
        """
