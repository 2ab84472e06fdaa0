"""One run: checks, algorithm, saved result, measurement, fine-tuning, report."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fusion
from fusion.checks import check_run
from fusion.errors import UserError
from fusion.evaluation import Evaluation, evaluate_run
from fusion.figures.accuracy_table import accuracy_table
from fusion.files import MODEL, write_text
from fusion.method import BaseAlgorithm
from fusion.method.base import ResultFile
from fusion.method.training_data import training_data
from fusion.model_card import model_card
from fusion.modelpool import BaseModelPool
from fusion.options import FilePath, Seed, TargetMapping, checked
from fusion.run_folder import CARD, CONFIG, FINETUNED, RunFolder, save_report
from fusion.target import build, build_nested, is_target
from fusion.taskpool import BaseTaskPool, ClassificationTaskPool
from fusion.training import FineTuned, FineTuning
from fusion.training.devices import FABRIC, check_loggers, make_fabric

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

_LOG_FORMAT = "[%(asctime)s] %(message)s"  # the log level of the command line's own process


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run: the network and all measurements.

    Attributes:
        model: the network; None if several processes made it; it is in the run folder then.
        report:
            the content of ``report.json``.
    """

    model: nn.Module | None
    report: dict[str, Any]


@dataclass(frozen=True)
class _Parts:
    """The objects of a run."""

    algorithm: BaseAlgorithm
    pool: BaseModelPool
    tasks: BaseTaskPool | None
    finetuning: FineTuning | None


class FusionProgram:
    """Run an algorithm on a pool, then save and measure the result.

    ``method``, ``modelpool``, ``taskpool`` and ``fabric`` are objects, or mappings with
    ``_target_`` that build them; several processes need mappings.

    Args:
        method: the algorithm.
        modelpool: the networks it takes.
        taskpool: the tasks that measure them, or None.
        finetune: further training of the result on
            the pool's training data, or None.
        fabric: Lightning's Fabric: devices, precision, loggers; None is the best single device.
        output_path: the run folder.
        seed: seeds everything that is random.
        dry_run: check everything without running or writing anything.
        report_save_path, merged_model_save_path: paths of the report and the model instead.
        overwrite: whether a finished run in that folder may be replaced.
        config: the configuration as text (YAML), written to the run folder.
        choices: choices by name (method, modelpool, …), for the report.
    """

    @checked
    def __init__(
        self,
        *,
        method: BaseAlgorithm | TargetMapping,
        modelpool: BaseModelPool | TargetMapping,
        taskpool: BaseTaskPool | TargetMapping | None = None,
        finetune: FineTuning | TargetMapping | None = None,
        fabric: Fabric | Mapping[str, Any] | None = None,
        output_path: FilePath,
        seed: Seed = 0,
        dry_run: bool = False,
        report_save_path: FilePath | None = None,
        merged_model_save_path: FilePath | None = None,
        overwrite: bool = False,
        config: str | None = None,
        choices: Mapping[str, Any] | None = None,
    ) -> None:
        self._method = method
        self._modelpool = modelpool
        self._taskpool = taskpool
        self._finetune = finetune
        self._fabric = fabric
        self._seed = seed
        self._dry_run = dry_run
        self._config = config
        self._choices = dict(choices or {})
        self._built: _Parts | None = None
        self.folder = RunFolder(
            output_path,
            report_path=report_save_path,
            model_path=merged_model_save_path,
            overwrite=overwrite,
        )

    def run(self) -> Outcome | None:
        """Check, merge, save, measure; return the outcome, or None after a dry run.

        Raises:
            UserError: a mistake of the user, found before any work.
        """
        parts = self._parts()
        self.folder.check(tables=parts.algorithm.output_path)
        # An algorithm that will write its result itself may leave reading the weights until then.
        parts.algorithm.result_file = None if self._dry_run else ResultFile(self.folder.model_path)
        try:
            check_run(parts.algorithm, parts.pool, parts.tasks, parts.finetuning)
        finally:
            parts.algorithm.result_file = None
        self._made_fabric(None)
        if self._dry_run:
            log.info(
                "Dry run: %s on %s would write to %s; everything checked is in order",
                type(parts.algorithm).__name__,
                ", ".join(parts.pool.all_model_names),
                self.folder.path,
            )
            return None
        outcome: Outcome | None = None
        with self.folder.writing() as working:
            fabric = self._made_fabric(working)
            if fabric.strategy.launcher is None:
                fabric.launch()
                outcome = self._run_in_process(fabric, working)
            else:
                self._built = None  # each process builds its own from the mappings
                fabric.launch(self._run_in_launched_process, working)  # type: ignore[arg-type]
        self.folder.log_contents()
        return outcome or Outcome(None, self.folder.load_report())

    def _run_in_launched_process(self, fabric: Fabric, working: Path) -> None:
        """Run in one of several processes; the outcome is written to files.

        Return values of processes pass through a pipe that is only read after they have ended, and
        would block them when it is full.
        """
        self._run_in_process(fabric, working)

    def _run_in_process(self, fabric: Fabric, working: Path) -> Outcome:
        """Do the whole run: merge, save, fine-tune, measure, report."""
        if fabric.is_global_zero and not logging.getLogger().handlers:  # a spawned process
            logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, datefmt="%H:%M:%S")
            logging.getLogger("fontTools").setLevel(logging.WARNING)
        parts = self._parts()
        algorithm, pool, tasks = parts.algorithm, parts.pool, parts.tasks
        fabric.seed_everything(self._seed, workers=True, verbose=False)
        algorithm.fabric = fabric
        elsewhere = algorithm.output_path is not None
        if not elsewhere:
            algorithm.output_path = working
        algorithm.result_file = ResultFile(working / MODEL, self._metadata(algorithm, pool))
        if fabric.is_global_zero and self._config is not None:
            write_text(working / CONFIG, self._config)
        seconds: dict[str, float] = {}
        try:
            start = time.perf_counter()
            model = algorithm.run(pool)
            seconds["run"] = time.perf_counter() - start
        finally:
            algorithm.result_file = None  # the object may serve another run
            if not elsewhere:
                algorithm.output_path = None
        if algorithm.record.written != working / MODEL:
            self._save(model, MODEL, algorithm, pool, fabric, working)
        finetuned: FineTuned | None = None
        if parts.finetuning is not None:
            start = time.perf_counter()
            finetuned = parts.finetuning.run(
                model,
                training_data(model, algorithm, pool),
                merged=algorithm.selected_layers,
                head=pool.head.tensors,
                fabric=fabric,
            )
            self._save(finetuned.model, FINETUNED, algorithm, pool, fabric, working)
            seconds["finetune"] = time.perf_counter() - start
        evaluation = Evaluation({}, {}, {})
        if tasks is not None:
            start = time.perf_counter()
            tasks.fabric = fabric
            tuned = None if finetuned is None else finetuned.model
            evaluation = evaluate_run(model, algorithm, pool, tasks, finetuned=tuned)
            seconds["evaluate"] = time.perf_counter() - start
        report = {
            **self._provenance(algorithm, pool),
            "sources": {name: pool.entry(name).member.source for name in pool.all_model_names},
            "datasets": sorted(_data_sets(self._modelpool)),
            "options": self._options(),
            "evaluation": evaluation.results,
            "shares_of_experts": evaluation.shares,
            "experts": evaluation.experts,
            "controls": list(algorithm.controls),
            "finetune": None if finetuned is None else finetuned.report(),
            "algorithm": algorithm.report,
            "timings": {what: asdict(timing) for what, timing in algorithm.timings.items()},
            "seconds": seconds,
            "environment": _environment(fabric),
        }
        if fabric.is_global_zero:
            _log_metrics(fabric, evaluation.results)
            if evaluation.results:
                log.info("Accuracy (%%)\n%s", accuracy_table(evaluation.results, evaluation.means))
            write_text(working / CARD, model_card(report, working / MODEL))
            save_report(working, report)
        fabric.barrier()
        return Outcome(model, report)

    def _save(
        self,
        model: nn.Module,
        name: str,
        algorithm: BaseAlgorithm,
        pool: BaseModelPool,
        fabric: Fabric,
        working: Path,
    ) -> None:
        if fabric.is_global_zero:
            pool.save_model(
                model,
                working / name,
                labels=algorithm.result_labels(pool),
                metadata=self._metadata(algorithm, pool),
            )

    def _metadata(self, algorithm: BaseAlgorithm, pool: BaseModelPool) -> dict[str, str]:
        """Return the metadata of the run for the network's file."""
        provenance = self._provenance(algorithm, pool)
        return {"provenance": json.dumps(provenance, default=str, sort_keys=True)}

    def _provenance(self, algorithm: BaseAlgorithm, pool: BaseModelPool) -> dict[str, Any]:
        return {
            "fusion": fusion.__version__,
            "choices": self._choices,
            "method": type(algorithm).__name__,
            "models": pool.all_model_names,
            "seed": self._seed,
        }

    def _parts(self) -> _Parts:
        """Return the run's objects, built once in each process."""
        if self._built is None:
            tasks, tuning = self._taskpool, self._finetune
            parts = _Parts(
                _made(self._method, BaseAlgorithm, "method"),
                _made(self._modelpool, BaseModelPool, "modelpool"),
                None if tasks is None else _made(tasks, BaseTaskPool, "taskpool"),
                None if tuning is None else _made(tuning, FineTuning, "finetune"),
            )
            if isinstance(parts.tasks, ClassificationTaskPool):
                parts.tasks.preprocessing = parts.pool.preprocessing
            self._built = parts
        return self._built

    def _options(self) -> dict[str, Any]:
        """Return the options of the objects given as mappings, as data."""
        given = {"method": self._method, "finetune": self._finetune}
        return {
            name: {key: value for key, value in spec.items() if not key.startswith("_")}
            for name, spec in given.items()
            if isinstance(spec, Mapping)
        }

    def _made_fabric(self, working: Path | None) -> Fabric:
        """Build the Fabric; several processes are spawned, not the command run again.

        Args:
            working: the folder in which the run is assembled, and to which its loggers write;
                ``None`` omits the loggers, to check whether the Fabric can be built.
        """
        from lightning.fabric import Fabric

        if self._fabric is None:
            return Fabric(accelerator="auto", devices=1)
        if isinstance(self._fabric, Fabric):
            return self._fabric
        options = {k: v for k, v in self._fabric.items() if k != "_target_"}
        loggers = _moved(options.pop("loggers", None), str(self.folder.path), str(working))
        check_loggers(loggers)
        if working is not None:
            options["loggers"] = build_nested(loggers) or None
        if str(options.get("devices", 1)) != "1" and options.get("strategy", "auto") == "auto":
            options["strategy"] = "ddp_spawn"
        return make_fabric(
            options, target=str(self._fabric.get("_target_", FABRIC)), prefix="fabric."
        )


def _moved(value: Any, source: str, target: str) -> Any:
    """Return nested options with every text ``source`` replaced by ``target``."""
    if isinstance(value, Mapping):
        return {key: _moved(item, source, target) for key, item in value.items()}
    return target if value == source else value


def _data_sets(value: Any) -> set[str]:
    """Return the constructors of data sets that a pool's mapping names."""
    if not isinstance(value, Mapping | list):
        return set()
    inner = value.values() if isinstance(value, Mapping) else value
    found = {name for item in inner for name in _data_sets(item)}
    target = str(value.get("_target_", "")) if isinstance(value, Mapping) else ""
    return found | ({target} if target.startswith("fusion.data.") else set())


def _made(value: Any, kind: type, option: str) -> Any:
    made = build(value) if is_target(value) else value
    if not isinstance(made, kind):
        raise UserError(f"{option} must be a {kind.__name__}, not a {type(made).__name__}")
    return made


def _environment(fabric: Fabric) -> dict[str, Any]:
    device = fabric.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": fabric.world_size,
        "cores": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _log_metrics(fabric: Fabric, evaluations: Mapping[str, Any]) -> None:
    metrics = {
        f"{name}/{task}/{metric}": result[metric]
        for name, tasks in evaluations.items()
        for task, result in tasks.items()
        for metric in result
        if isinstance(result[metric], float)
    }
    if metrics and fabric.loggers:
        fabric.log_dict(metrics)
        for logger in fabric.loggers:
            logger.finalize("success")
