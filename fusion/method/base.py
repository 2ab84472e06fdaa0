"""An algorithm: what takes a pool of networks and returns one."""

from __future__ import annotations

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fusion.labels import LabelSpace
from fusion.modelpool import BaseModelPool, as_modelpool

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)


@dataclass
class Timing:
    """How often a profiled action ran, and how long in all (seconds)."""

    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ResultFile:
    """Where an algorithm may write its result while it makes it.

    Attributes:
        path: the safetensors file.
        metadata: strings to keep in it, beside what says how to build the network.
    """

    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """What one run of an algorithm says beside its result.

    Attributes:
        report: plain JSON values for ``report.json``.
        controls: networks that are measured beside the result: name → what makes the network.
        labels: name of a control → the classes of its outputs, where they are not the result's.
        timings: time spent under each name given to :meth:`BaseAlgorithm.profile`.
        written: the file that holds the result, if the algorithm wrote it; as
            :meth:`BaseModelPool.save_model` would have.
    """

    report: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    labels: dict[str, LabelSpace | None] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    written: Path | None = None


class BaseAlgorithm(ABC):
    """Subclass this, write ``run``, and name the class as a method's ``_target_``.

    ``run`` always receives a :class:`BaseModelPool` that passed :meth:`check_pool`: whoever calls
    it may pass a pool, a ``dict[str, nn.Module]``, a list of modules or one module. Around the
    outermost call stand the hooks :meth:`on_run_start` and :meth:`on_run_end`. This holds wherever
    ``run`` was defined: in the class, in a mixin, or assigned later. No constructor of this class
    needs to be called, and a pool is never changed: what it returns are copies.

    Attributes:
        output_path: the folder for the tables and figures that the algorithm writes; ``None``
            writes nothing (from the command line it is the run folder).
        result_file: the file in which the result is wanted. An algorithm may write it itself, and
            note that in its record; else whoever asked for it does (from the command line it is the
            run's).
        progress: whether to show progress bars; ``None`` shows them where there is a terminal.
    """

    output_path: Path | None = None
    result_file: ResultFile | None = None
    progress: bool | None = None
    _fabric: Fabric | None = None
    _running: bool = False
    _record: Record | None = None

    @abstractmethod
    def run(self, modelpool: Any) -> nn.Module:
        """Return a new network made from the pool.

        Args:
            modelpool: written for: a :class:`BaseModelPool`. Called with: that, or whatever
                :func:`fusion.modelpool.as_modelpool` makes one of.
        """

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
    def record(self) -> Record:
        """What the present or the last run says beside its result; each run begins a new one."""
        if self._record is None:
            self._record = Record()
        return self._record

    @property
    def report(self) -> dict[str, Any]:
        """What the run says in ``report.json`` beside the timings: plain JSON values."""
        return self.record.report

    @property
    def controls(self) -> dict[str, Callable[[], nn.Module]]:
        """Networks that are measured beside the result: name → what makes the network.

        ``run`` fills it with whatever an honest reader would compare the result with.
        """
        return self.record.controls

    @property
    def timings(self) -> dict[str, Timing]:
        """The time spent under each name given to :meth:`profile`."""
        return self.record.timings

    @property
    def selected_layers(self) -> list[str]:
        """The names of the layers that ``run`` merged; none by default.

        A selective fine-tuning trains these and the head.
        """
        return []

    def result_labels(self, modelpool: BaseModelPool) -> LabelSpace | None:
        """Return the classes of the result's outputs; the base's by default."""
        return modelpool.labels(modelpool.pretrained_or_first_name)

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

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute; ``run`` comes with everything that stands around it.

        Looking it up here, rather than wrapping it when a class is made, covers mixins and
        functions that are assigned to a class or an object. ``super().run`` does not pass here and
        is the bare method.
        """
        value = super().__getattribute__(name)
        return functools.partial(_run, self, value) if name == "run" else value


def _run(
    algorithm: BaseAlgorithm, run: Callable[[BaseModelPool], nn.Module], modelpool: object
) -> nn.Module:
    """Call an algorithm's ``run``: pool made and checked, hooks called, time logged."""
    pool = as_modelpool(modelpool)
    if algorithm._running:  # run calls self.run: the outermost call has done it all
        return run(pool)
    algorithm.check_pool(pool)
    algorithm._running = True
    algorithm._record = Record()
    try:
        algorithm.on_run_start()
        with algorithm.profile("run"):
            return run(pool)
    finally:
        algorithm._running = False
        algorithm.on_run_end()
        log.info("Time: %s", _summary(algorithm.timings))


def _summary(timings: Mapping[str, Timing]) -> str:
    return ", ".join(
        f"{what} {timing.seconds:.1f} s" + (f" in {timing.calls} calls" if timing.calls > 1 else "")
        for what, timing in timings.items()
    )
