"""Run one job: convert the composed configuration to plain mappings and run the program."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from fusion.annotations import misfit
from fusion.cli import sweep
from fusion.cli.folders import extra_folders
from fusion.cli.freed_memory import keep_freed_memory
from fusion.cli.mistakes import explain, limit_of_machine, tell
from fusion.cli.unknown import known_values, through_reference
from fusion.config_folder import config_folder
from fusion.errors import UserError
from fusion.options import FilePath, Seed

log = logging.getLogger(__name__)

# What a sweep makes its list of jobs from; a job is the same whichever list it comes from.
_LISTS_OF_JOBS = ("benchmark", "methods", "settings")
_FOLDER_NAME_LENGTH = 120  # well below the 255 bytes that file systems allow
_GROUPS = ("method", "modelpool", "taskpool", "finetune", "fabric", "merge", "wrapper", "setting")
_KINDS: dict[str, Any] = {
    "seed": Seed,
    "output_path": FilePath,
    "overwrite": bool,
    "fast_dev_run": bool,
    "dry_run": bool,
    "print_config": bool,
    "report_save_path": FilePath | None,
    "merged_model_save_path": FilePath | None,
    "path.output_root": FilePath,
    "path.cache_dir": FilePath,
    "path.data_dir": FilePath,
    "path.checkpoint": FilePath | None,
    "hydra.run.dir": FilePath,
    "hydra.sweep.dir": FilePath,
    "hydra.sweep.subdir": FilePath,
}


def job(config: DictConfig) -> None:
    """Run the program that ``config`` describes in the folder that Hydra gave this job."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        _run(_configured(config, folder), folder)
    except UserError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the other jobs go on
        tell(error)
    except OSError as error:
        if (limit := limit_of_machine(error)) is None:
            raise
        tell(limit)
    finally:  # a mistake and a dry run leave no empty folder behind
        remove_empty(folder, below=Path(str(OmegaConf.select(config, "path.output_root"))))


def remove_empty(folder: Path, *, below: Path) -> None:
    """Remove ``folder`` if it is empty, and the folders that held only it, up to ``below``.

    The current folder and its parents are kept.
    """
    folder, below, here = folder.absolute(), below.absolute(), Path.cwd()
    parents = [p for p in folder.parents if p == below or below in p.parents]
    with contextlib.suppress(OSError):  # stop at the first that is not empty
        for empty in (folder, *parents):
            if empty in (here, *here.parents):
                break
            empty.rmdir()


def _configured(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Return the configuration of the job in plain values, checked as far as it can be here.

    Raises:
        UserError: a key of the run or a reference is wrong.
    """
    try:
        _check_kinds(config)
        _check_references()
        _check_save_paths(config)
        values = plain_values(config, [str(key) for key in config if key not in _LISTS_OF_JOBS])
    except OmegaConfBaseException as error:
        typed = [*sys.argv[1:], *_overrides()]
        raise UserError(explain(error, typed, config_folder())) from error
    for group in ("method", "modelpool", "fabric"):
        if group not in values:
            raise UserError(
                f"the configuration has no {group}: the YAML of {group}="
                f"{HydraConfig.get().runtime.choices.get(group)} says '# @package' of another "
                f"place; leave that line out"
            )
    values["output_path"] = str(folder)
    return values


def _run(values: dict[str, Any], folder: Path) -> None:
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    if values["print_config"]:
        log.info("Configuration\n%s", text.rstrip())

    if HydraConfig.get().mode is not RunMode.MULTIRUN or values["dry_run"]:
        _run_program(values, folder, text)
    elif sweep.already_finished(folder, text, overwrite=values["overwrite"]):
        log.info("Finished in an earlier sweep: %s", folder)
    else:
        values["overwrite"] = values["overwrite"] or sweep.is_of(folder, text)
        with sweep.failing_alone(folder, job=HydraConfig.get().job.num):
            _run_program(values, folder, text)


def _run_program(values: Mapping[str, Any], folder: Path, text: str) -> None:
    from fusion.program import FusionProgram  # imports torch

    keep_freed_memory()
    FusionProgram(
        method=values.get("wrapper") or values["method"],
        modelpool=values["modelpool"],
        taskpool=values.get("taskpool"),
        finetune=values["finetune"] or None,
        fabric=values["fabric"],
        output_path=folder,
        seed=values["seed"],
        dry_run=values["dry_run"],
        report_save_path=values["report_save_path"],
        merged_model_save_path=values["merged_model_save_path"],
        overwrite=values["overwrite"],
        config=text,
        choices=_choices(),
    ).run()


def plain_values(config: DictConfig, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the configuration in plain Python values, every reference resolved.

    Args:
        config: what Hydra composed.
        keys: the requested entries; by default all.

    Raises:
        UserError: a mandatory value is missing.
    """
    values: dict[str, Any] = {}
    for key in config if keys is None else keys:
        # A path without a reference to it may stay without a value.
        complete = key != "path"
        try:
            node = config[key]
            values[str(key)] = (
                OmegaConf.to_container(node, resolve=True, throw_on_missing=complete)
                if OmegaConf.is_config(node)
                else node
            )
        except InterpolationToMissingValueError as error:
            missing = re.search(r"Missing mandatory value: (\S+)", str(error))
            wanted = missing[1] if missing else str(error.full_key)
            raise UserError(f"{wanted} has no value; give it as {wanted}=VALUE") from error
        except MissingMandatoryValue as error:
            wanted = str(error.full_key or error.key)
            raise UserError(f"{wanted} has no value; give it as {wanted}=VALUE") from error
    return values


def register_resolvers() -> None:
    """Register the resolvers that the shipped YAML uses."""
    OmegaConf.register_new_resolver("user_cache", user_cache, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("joined", joined, replace=True)


def user_cache() -> str:
    """Return this package's folder in the user's cache (XDG base directory specification)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(root) / "fusion")


def joined(*lists: Sequence[object] | None) -> str:
    """Return the entries of several lists as a sweep writes them, ``a,b,c``; each once."""
    return ",".join(dict.fromkeys(str(entry) for values in lists for entry in values or ()))


def run_name(*, _root_: DictConfig) -> str:
    """Return ``<method>/<modelpool>`` as chosen by name; ``sweeps`` for a sweep.

    Hydra's own resolver does not have the choices yet when a sweep requests its folder.
    """
    hydra: Any = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        return "sweeps"
    return f"{hydra.runtime.choices.method}/{hydra.runtime.choices.modelpool}"


def job_folder(number: int | str, overrides: Sequence[str]) -> str:
    """Return the folder name of a sweep's job: its number and its overrides, readable.

    The number makes it unique within the sweep whichever launcher runs it; overrides too long for
    a file name are truncated and distinguished by a hash.
    """
    told = [o for o in overrides if not o.startswith(("output_path=", "path."))]
    name = re.sub(r"[^\w.,=+-]+", "-", ",".join(told)).strip("-")
    if len(name) > _FOLDER_NAME_LENGTH:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[:_FOLDER_NAME_LENGTH]}-{digest}"
    return f"{number}_{name}" if name else str(number)


def _choices() -> Mapping[str, Any]:
    """Return the choices by name for the report: groups and this job's overrides."""
    hydra = HydraConfig.get()
    chosen: dict[str, Any] = {group: hydra.runtime.choices.get(group) for group in _GROUPS}
    chosen["overrides"] = _overrides()
    if hydra.mode is RunMode.MULTIRUN:
        chosen["job"] = hydra.job.num
    return chosen


def _overrides() -> list[str]:
    """Return the job's overrides as they were typed; a reference in one stays a reference."""
    return list(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))  # type: ignore[arg-type]


def _check_kinds(config: DictConfig) -> None:
    """Check the keys of the run.

    Raises:
        UserError: one is invalid.
    """
    if isinstance(config.seed, float) and config.seed.is_integer():
        config.seed = int(config.seed)  # 1e9 is how a large whole number is typed
    whole: Any = HydraConfig.instance().cfg
    for key, kind in _KINDS.items():
        value = OmegaConf.select(whole if key.startswith("hydra.") else config, key)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if (wrong := misfit(value, kind)) is not None:
            raise UserError(wrong.sentence(key))


def _check_references() -> None:
    """Check that no option was added below a node that only refers to another one.

    Raises:
        UserError: one was, which would replace the reference and everything that it refers to.
    """
    overrides = _overrides()
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("+") and "." in key:
            key = key.lstrip("+")
            extra = extra_folders(sys.argv)
            known = known_values(overrides, key, config_folder(), extra)
            if (wrong := through_reference(key, known)) is not None:
                raise UserError(wrong)


def _check_save_paths(config: DictConfig) -> None:
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    for key in ("report_save_path", "merged_model_save_path"):
        raw = OmegaConf.to_container(config, resolve=False)
        assert isinstance(raw, dict)
        if raw[key] is not None and "${" not in str(raw[key]):
            raise UserError(
                f"{key}={raw[key]}: the jobs of a sweep would overwrite each other's; leave it out "
                f"(each job has its own folder), or put the job's number into it, as in "
                f"'{key}=/folder/${{hydra:job.num}}{Path(str(raw[key])).suffix}'"
            )
