"""Base class of algorithms, which take a pool of networks and return one network."""

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
    """Number of calls of a profiled action and their total time in seconds."""

    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ResultFile:
    """The file to which an algorithm may write its result while computing it.

    Attributes:
        path: the safetensors file.
        metadata: strings to store in it, in addition to the description of the network.
    """

    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """Record of one run of an algorithm, in addition to its result.

    Attributes:
        report: plain JSON values for ``report.json``.
        controls: networks that are measured alongside the result: name → function that builds it.
        labels: name of a control → the classes of its outputs, if they differ from the result's.
        timings: time spent under each name given to :meth:`BaseAlgorithm.profile`.
        written: the file with the result, if the algorithm wrote it in the format of
            :meth:`BaseModelPool.save_model`.
    """

    report: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    labels: dict[str, LabelSpace | None] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    written: Path | None = None


class BaseAlgorithm(ABC):
    """Subclass this, write ``run``, and name the class as a method's ``_target_``.

    ``run`` always receives a :class:`BaseModelPool` that passed :meth:`check_pool`: the caller may
    pass a pool, a ``dict[str, nn.Module]``, a list of modules or one module. The outermost call is
    surrounded by the hooks :meth:`on_run_start` and :meth:`on_run_end`. This holds wherever ``run``
    was defined: in the class, in a mixin, or assigned later. No constructor of this class needs to
    be called, and a pool is never changed: it returns copies.

    Attributes:
        output_path: the folder for the tables and figures that the algorithm writes; ``None``
            writes nothing (from the command line it is the run folder).
        result_file: the file requested for the result. An algorithm may write it itself and note
            that in its record; otherwise the caller does (from the command line it is the run's
            file).
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
            modelpool: a :class:`BaseModelPool` in the implementation; callers may also pass
                anything that :func:`fusion.modelpool.as_modelpool` accepts.
        """

    def on_run_start(self) -> None:
        """Hook before ``run``; does nothing by default."""

    def on_run_end(self) -> None:
        """Hook after ``run``, also when it failed; does nothing by default."""

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check, before any work, that the algorithm can run on this pool.

        By default the requirements are those of merging (:meth:`BaseModelPool.preflight`).

        Raises:
            UserError: the algorithm cannot run on this pool.
        """
        modelpool.preflight()

    @property
    def fabric(self) -> Fabric:
        """Lightning's Fabric, which determines the device. Created on first use if none was set."""
        if self._fabric is None:
            from lightning.fabric import Fabric

            self._fabric = Fabric(accelerator="auto", devices=1)
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Fabric) -> None:
        self._fabric = fabric

    @property
    def record(self) -> Record:
        """The record of the present or the last run; each run begins a new one."""
        if self._record is None:
            self._record = Record()
        return self._record

    @property
    def report(self) -> dict[str, Any]:
        """The run's entries in ``report.json`` in addition to the timings: plain JSON values."""
        return self.record.report

    @property
    def controls(self) -> dict[str, Callable[[], nn.Module]]:
        """Networks that are measured alongside the result: name → function that builds it.

        ``run`` fills it with the networks with which the result should be compared.
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
        """Return an attribute; ``run`` is returned with its checks and hooks.

        Looking it up here, rather than wrapping it when a class is made, covers mixins and
        functions that are assigned to a class or an object. ``super().run`` bypasses this and is
        the bare method.
        """
        value = super().__getattribute__(name)
        return functools.partial(_run, self, value) if name == "run" else value


def _run(
    algorithm: BaseAlgorithm, run: Callable[[BaseModelPool], nn.Module], modelpool: object
) -> nn.Module:
    """Call an algorithm's ``run``: make and check the pool, call the hooks, log the time."""
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
