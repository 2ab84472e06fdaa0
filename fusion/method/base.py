"""An algorithm: what takes a pool of networks and returns one."""

from __future__ import annotations

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion.modelpool import BaseModelPool, as_modelpool

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


@dataclass
class Timing:
    """How often a profiled action ran, and how long in all (seconds)."""

    calls: int = 0
    seconds: float = 0.0


class BaseAlgorithm(ABC):
    """Subclass this, write ``run``, and name the class as a method's ``_target_``.

    ``run`` always receives a :class:`BaseModelPool` that passed :meth:`check_pool`: whoever calls
    it may hand over a pool, a ``dict[str, nn.Module]``, a list of modules or one module. Around
    the outermost call stand the hooks :meth:`on_run_start` and :meth:`on_run_end`. No constructor
    of this class needs to be called, and a pool is never changed: what it hands out are copies.

    Attributes:
        output_path: the folder for the tables and figures that the algorithm writes; ``None``
            writes nothing (from the command line it is the run folder).
        progress: whether to show progress bars; ``None`` shows them where there is a terminal.
    """

    output_path: Path | None = None
    progress: bool | None = None
    _fabric: Fabric | None = None
    _running: bool = False

    @abstractmethod
    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return a new network made from the pool."""

    def on_run_start(self) -> None:
        """Do something before ``run``; nothing by default."""

    def on_run_end(self) -> None:
        """Do something after ``run``, also when it failed; nothing by default."""

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check, before any work, that the algorithm can run on this pool.

        The default demands what merging demands (:meth:`BaseModelPool.preflight`).

        Raises:
            UserError: says what is wrong and the cure.
        """
        modelpool.preflight()

    @property
    def fabric(self) -> Fabric:
        """Lightning's Fabric: where tensors live. Made on first use if none was set."""
        if self._fabric is None:
            from lightning.fabric import Fabric

            self._fabric = Fabric(accelerator="auto", devices=1)
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Fabric) -> None:
        self._fabric = fabric

    @property
    def report(self) -> dict[str, Any]:
        """What the algorithm says in ``report.json`` beside the timings: plain JSON values."""
        content: dict[str, Any] = self.__dict__.setdefault("_report", {})
        return content

    @property
    def references(self) -> dict[str, Callable[[], nn.Module]]:
        """Controls that a program evaluates beside the result: name → what makes the network.

        ``run`` fills it with whatever an honest reader would compare the result with.
        """
        models: dict[str, Callable[[], nn.Module]] = self.__dict__.setdefault("_references", {})
        return models

    @property
    def selected_layers(self) -> list[str]:
        """The names of the layers that ``run`` merged; none by default.

        A selective fine-tuning trains these and the head.
        """
        return []

    def result_classes(self, modelpool: BaseModelPool) -> tuple[int, ...] | None:
        """Return the original labels of the result's outputs; the base's by default."""
        return modelpool.classes(modelpool.pretrained_or_first_name)

    @property
    def timings(self) -> dict[str, Timing]:
        """The time spent under each name given to :meth:`profile`."""
        timings: dict[str, Timing] = self.__dict__.setdefault("_timings", {})
        return timings

    @contextmanager
    def profile(self, what: str) -> Iterator[None]:
        """Add the block's wall time to :attr:`timings` under ``what``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            timing = self.timings.setdefault(what, Timing())
            timing.calls += 1
            timing.seconds += time.perf_counter() - start

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "run" in cls.__dict__ and not getattr(cls.run, "__isabstractmethod__", False):
            setattr(cls, "run", _prepared(cls.run))  # noqa: B010 - mypy guards plain assignment


def _prepared(
    run: Callable[[Any, BaseModelPool], nn.Module],
) -> Callable[[Any, object], nn.Module]:
    """Wrap a subclass's ``run``: pool made and checked, hooks called, timings told."""

    @functools.wraps(run)
    def prepared(self: BaseAlgorithm, modelpool: object) -> nn.Module:
        pool = as_modelpool(modelpool)
        if self._running:  # a subclass that calls super().run: the outermost call has done it all
            return run(self, pool)
        self.check_pool(pool)
        self._running = True
        try:
            self.on_run_start()
            with self.profile("run"):
                return run(self, pool)
        finally:
            self._running = False
            self.on_run_end()
            log.info("Time: %s", _summary(self.timings))

    return prepared


def _summary(timings: Mapping[str, Timing]) -> str:
    return ", ".join(
        f"{what} {timing.seconds:.1f} s" + (f" in {timing.calls} calls" if timing.calls > 1 else "")
        for what, timing in timings.items()
    )
