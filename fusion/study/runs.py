"""The runs below a folder: finished, failed, not applicable or interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.annotations import misfit
from fusion.errors import NotApplicableError, UserError
from fusion.run_folder import ERROR, READY, REPORT, WORKING, recover
from fusion.run_folder import UNFINISHED as LEFT

_NAMED = 3  # maximum number of runs named for one reason of failure
# Schema of a report; a file of other origin may hold anything.
_Plain = str | int | float | None
_Figure = float | None
_Metric = float | Mapping[str, Any] | Sequence[Any] | None
_SHAPE: dict[str, Any] = {
    "method": _Plain,
    "seed": _Plain,
    "options": Mapping[str, Mapping[str, Any]],
    "controls": Sequence[str],
    "choices": Mapping[str, Any],
    "choices.job": int | None,
    "choices.method": _Plain,
    "choices.modelpool": _Plain,
    "choices.taskpool": _Plain,
    "choices.setting": _Plain,
    "choices.overrides": Sequence[str],
    "evaluation": Mapping[str, Mapping[str, Mapping[str, _Metric]]],
    "seconds": Mapping[str, _Figure],
    "environment": Mapping[str, Any],
    "finetune": Mapping[str, Any] | None,
    "finetune.strategy": _Plain,
    "finetune.same_as": Sequence[str],
    "finetune.seconds": _Figure,
    "finetune.peak_bytes": _Figure,
    "finetune.memory": _Plain,
    "finetune.trained_parameters": _Figure,
    "algorithm": Mapping[str, Any],
    "algorithm.selected_layers": Sequence[str] | None,
    "algorithm.batch_norm": _Plain,
    "algorithm.candidate_layers": _Figure,
    "algorithm.consistency": Mapping[str, Mapping[str, Any]],
    "algorithm.benchmarked": str,
    "algorithm.needs": Sequence[str],
    "algorithm.conditions": Mapping[str, Mapping[str, Any]],
    "experts": Mapping[str, str],
}
_ABSENT = object()
FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"
NOT_APPLICABLE = "not applicable"  # a method that does not apply to the pool: no failure


@dataclass(frozen=True)
class Run:
    """One run, read from its folder.

    Attributes:
        name: the folder, relative to the one that was searched.
        status: ``finished``, ``failed``, ``not applicable`` or ``unfinished``.
        report: its report; empty unless finished.
        error: why it failed or does not apply, in a sentence.
        job: its number in the sweep, where it is known.
    """

    name: str
    status: str
    report: dict[str, Any]
    error: str = ""
    job: int | None = None


def read_runs(folder: str | Path) -> list[Run]:
    """Return every run below ``folder``, in the order of their jobs.

    Raises:
        UserError: there is no such folder, no run in it, or a report cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; give the folder of a sweep, or one above")
    for ready in folder.rglob(f"{READY}*"):
        recover(ready.parent)
    found = [file for name in (REPORT, ERROR, f"{WORKING}*") for file in folder.rglob(name)]
    places = {file.parent for file in found if not _is_inside_a_run(file.relative_to(folder))}
    runs = [_read(place, str(place.relative_to(folder))) for place in places]
    if not runs:
        raise UserError(f"there is no run in '{folder}' (no {REPORT}); give the folder of a sweep")
    return sorted(runs, key=lambda run: (run.job is None, run.job or 0, run.name))


def troubles(runs: Sequence[Run]) -> list[str]:
    """Return the failed or interrupted runs, one sentence per reason."""
    return _by_reason(run for run in runs if run.status in (FAILED, UNFINISHED))


def not_applicable(runs: Sequence[Run]) -> list[str]:
    """Return the methods that did not apply to a pool, one sentence per reason."""
    return _by_reason(run for run in runs if run.status == NOT_APPLICABLE)


def _by_reason(runs: Iterable[Run]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for run in runs:
        reasons.setdefault(run.error or "not finished", []).append(run.name)
    found = []
    for reason, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        found.append(f"{', '.join(names[:_NAMED])}{more}: {reason}")
    return found


def _is_inside_a_run(file: Path) -> bool:
    """Return whether a file is in the hidden folder of a run, or among the leftovers of one."""
    return any(part.startswith((WORKING, READY)) or part == LEFT for part in file.parts[:-1])


def _read(place: Path, name: str) -> Run:
    if (place / REPORT).is_file():
        report = _json(place / REPORT)
        _check_shape(report, place / REPORT)
        return Run(name, FINISHED, report, job=report.get("choices", {}).get("job"))
    if (place / ERROR).is_file():
        error = _json(place / ERROR)
        if error.get("kind") == NotApplicableError.__name__:
            return Run(name, NOT_APPLICABLE, {}, str(error.get("message", "")), error.get("job"))
        told = f"{error.get('kind', '')}: {error.get('message', '')}"
        return Run(name, FAILED, {}, told, job=error.get("job"))
    return Run(name, UNFINISHED, {})


def _check_shape(report: Mapping[str, Any], file: Path) -> None:
    for path, kind in _SHAPE.items():
        node: Any = report
        for key in path.split("."):
            node = node.get(key, _ABSENT) if isinstance(node, Mapping) else _ABSENT
        if node is not _ABSENT and (wrong := misfit(node, kind)) is not None:
            raise UserError(f"'{file}': {wrong.sentence(path)}, or run that job again")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"'{file}' is no JSON ({error}); remove it and run that job again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"'{file}' holds no report; remove it and run that job again")
    return content
