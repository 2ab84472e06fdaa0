"""One run, from the checks to the run folder."""

from __future__ import annotations

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
from fusion.errors import UserError
from fusion.figures.accuracy_table import accuracy_table
from fusion.method import BaseAlgorithm
from fusion.modelpool import BaseModelPool
from fusion.run_folder import RunFolder
from fusion.target import build, build_nested, is_target
from fusion.taskpool import BaseTaskPool
from fusion.training import FineTuned, FineTuning

if TYPE_CHECKING:
    from lightning.fabric import Fabric

log = logging.getLogger(__name__)

_LOG_FORMAT = "[%(asctime)s] %(message)s"  # what the command line's own process shows


@dataclass(frozen=True)
class Outcome:
    """What a run made: the network and everything measured of it.

    Attributes:
        model: the network; None where several processes made it: it is in the run folder.
        report: what ``report.json`` holds.
    """

    model: nn.Module | None
    report: dict[str, Any]


class FusionProgram:
    """Take a pool, run an algorithm on it, measure what came out, keep everything.

    ``method``, ``modelpool``, ``taskpool`` and ``fabric`` are objects, or mappings with
    ``_target_`` that build them; several processes need mappings.

    Args:
        method: the algorithm.
        modelpool: the networks it takes.
        taskpool: what measures them, or None.
        finetune: how the result is trained further, on the pool's training data, or None.
        fabric: Lightning's Fabric: devices, precision, loggers; None is one device, the best.
        output_path: the run folder.
        seed: seeds everything that is random.
        dry_run: check everything, start nothing, leave nothing behind.
        report_save_path, merged_model_save_path: where the report and the model go instead.
        overwrite: whether a finished run in that folder may be replaced.
        config: the configuration as text (YAML), kept in the run folder.
        choices: what was chosen by name (method, modelpool, …), for the report.
    """

    def __init__(
        self,
        *,
        method: BaseAlgorithm | Mapping[str, Any],
        modelpool: BaseModelPool | Mapping[str, Any],
        taskpool: BaseTaskPool | Mapping[str, Any] | None = None,
        finetune: FineTuning | Mapping[str, Any] | None = None,
        fabric: Fabric | Mapping[str, Any] | None = None,
        output_path: str | Path,
        seed: int = 0,
        dry_run: bool = False,
        report_save_path: str | Path | None = None,
        merged_model_save_path: str | Path | None = None,
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
        self.folder = RunFolder(
            output_path,
            report_path=report_save_path,
            model_path=merged_model_save_path,
            overwrite=overwrite,
        )

    def run(self) -> Outcome | None:
        """Check, merge, measure, keep; return the outcome, or None after a dry run.

        Raises:
            UserError: something is wrong with what the user gave, found before any work.
        """
        algorithm, pool, tasks, finetuning = self._parts()
        self.folder.check()
        algorithm.check_pool(pool)
        if tasks is not None:
            tasks.check()
        if finetuning is not None and not pool.train_dataset_names:
            raise UserError(
                "fine-tuning needs images, and the pool has no train_datasets; add them, or leave "
                "finetune out"
            )
        fabric = self._made_fabric()
        if self._dry_run:
            log.info(
                "Dry run: %s on %s would write to %s; everything checked is in order",
                type(algorithm).__name__,
                ", ".join(pool.all_model_names),
                self.folder.path,
            )
            return None
        outcome: Outcome | None = fabric.launch(self._run_in_process)
        return outcome or Outcome(None, self.folder.load_report())

    def _run_in_process(self, fabric: Fabric) -> Outcome | None:
        """Do the whole run in one of the processes that Fabric launched.

        Only a single process hands its outcome back: what several would send passes through a
        pipe that nobody reads before they have ended, and blocks them when it is full.
        """
        if fabric.is_global_zero and not logging.getLogger().handlers:  # a spawned process
            logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, datefmt="%H:%M:%S")
            logging.getLogger("fontTools").setLevel(logging.WARNING)
        algorithm, pool, tasks, finetuning = self._parts()
        fabric.seed_everything(self._seed, workers=True, verbose=False)
        algorithm.fabric = fabric
        if algorithm.output_path is None:
            algorithm.output_path = self.folder.path
        if fabric.is_global_zero:
            self.folder.clear()
            if self._config is not None:
                self.folder.save_config(self._config)
        start = time.perf_counter()
        model = algorithm.run(pool)
        seconds = {"run": time.perf_counter() - start}
        evaluations: dict[str, Any] = {}
        if tasks is not None:
            start = time.perf_counter()
            tasks.fabric = fabric
            evaluations = self._evaluate(model, algorithm, pool, tasks)
            seconds["evaluate"] = time.perf_counter() - start
        finetuned: FineTuned | None = None
        if finetuning is not None:
            start = time.perf_counter()
            labels = algorithm.result_classes(pool)
            images: Any = pool.calibration_dataset()
            finetuned = finetuning.run(
                model,
                images,
                merged=algorithm.selected_layers,
                classes=labels,
                fabric=fabric,
            )
            if tasks is not None:
                evaluations["finetuned"] = tasks.evaluate(finetuned.model, classes=labels)
            seconds["finetune"] = time.perf_counter() - start
        report = {
            "fusion": fusion.__version__,
            "choices": self._choices,
            "options": self._options(),
            "method": type(algorithm).__name__,
            "models": pool.all_model_names,
            "seed": self._seed,
            "evaluation": evaluations,
            "references": list(algorithm.references),
            "finetune": None if finetuned is None else finetuned.report(),
            "algorithm": algorithm.report,
            "timings": {what: asdict(timing) for what, timing in algorithm.timings.items()},
            "seconds": seconds,
            "environment": _environment(fabric),
        }
        if fabric.is_global_zero:
            provenance = {
                key: report[key] for key in ("fusion", "choices", "method", "models", "seed")
            }
            self.folder.save_model(model, pool, provenance)
            if finetuned is not None:
                self.folder.save_finetuned(finetuned.model, pool, provenance)
            self.folder.save_report(report)
            _log_metrics(fabric, evaluations)
            if evaluations:
                log.info("Accuracy (%%)\n%s", accuracy_table(evaluations))
            self.folder.tell()
        fabric.barrier()
        return Outcome(model, report) if fabric.world_size == 1 else None

    def _evaluate(
        self,
        model: nn.Module,
        algorithm: BaseAlgorithm,
        pool: BaseModelPool,
        tasks: BaseTaskPool,
    ) -> dict[str, Any]:
        """Measure the members (when asked), the algorithm's references, and the result."""
        evaluations: dict[str, Any] = {}
        if tasks.evaluate_members:
            for name in pool.all_model_names:
                log.info("Evaluating %s", name)
                evaluations[name] = tasks.evaluate(
                    pool.load_model(name), classes=pool.classes(name)
                )
        labels = algorithm.result_classes(pool)
        for name, reference in algorithm.references.items():
            log.info("Evaluating %s", name)
            evaluations[name] = tasks.evaluate(reference(), classes=labels)
        log.info("Evaluating the result")
        evaluations["merged"] = tasks.evaluate(model, classes=labels)
        return evaluations

    def _parts(
        self,
    ) -> tuple[BaseAlgorithm, BaseModelPool, BaseTaskPool | None, FineTuning | None]:
        return (
            _made(self._method, BaseAlgorithm, "method"),
            _made(self._modelpool, BaseModelPool, "modelpool"),
            None if self._taskpool is None else _made(self._taskpool, BaseTaskPool, "taskpool"),
            None if self._finetune is None else _made(self._finetune, FineTuning, "finetune"),
        )

    def _options(self) -> dict[str, Any]:
        """Return the options of what was given as a mapping, the choices of a run as data."""
        given = {"method": self._method, "finetune": self._finetune}
        return {
            name: {key: value for key, value in spec.items() if not key.startswith("_")}
            for name, spec in given.items()
            if isinstance(spec, Mapping)
        }

    def _made_fabric(self) -> Fabric:
        """Build the Fabric; several processes are spawned, not the command run again."""
        from lightning.fabric import Fabric

        if self._fabric is None:
            return Fabric(accelerator="auto", devices=1)
        if isinstance(self._fabric, Fabric):
            return self._fabric
        options = {k: v for k, v in self._fabric.items() if k != "_target_"}
        options["loggers"] = build_nested(options.get("loggers")) or None
        if options.get("devices", 1) != 1 and options.get("strategy", "auto") == "auto":
            options["strategy"] = "ddp_spawn"
        return _fabric(str(self._fabric.get("_target_", "lightning.fabric.Fabric")), options)


def _fabric(target: str, options: Mapping[str, Any]) -> Fabric:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        made: Fabric = build({"_target_": target, "_recursive_": False, **options})
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        shown = ", ".join(f"fabric.{key}={value}" for key, value in options.items() if value)
        raise UserError(f"Lightning Fabric refuses {shown}: {error}") from error
    return made


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
