"""The runs below a folder: those that finished, failed, or were cut off."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.run_folder import CONFIG, ERROR, REPORT

FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells.

    Attributes:
        name: the folder, relative to the one that was searched.
        status: ``finished``, ``failed`` or ``unfinished``.
        report: its report; empty unless finished.
        error: why it failed, in a sentence.
    """

    name: str
    status: str
    report: dict[str, Any]
    error: str = ""

    @property
    def order(self) -> tuple[int, str]:
        """Where it stands among its siblings: by job number, then by name."""
        number = self.report.get("choices", {}).get("job")
        return (number if isinstance(number, int) else 0, self.name)


def read_runs(folder: str | Path) -> list[Run]:
    """Return every run below ``folder``, in the order of their jobs.

    Raises:
        UserError: there is no such folder, no run in it, or a report cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; give the folder of a sweep, or one above")
    places = {file.parent for name in (REPORT, ERROR, CONFIG) for file in folder.rglob(name)}
    runs = [_read(place, str(place.relative_to(folder))) for place in places]
    if not runs:
        raise UserError(f"there is no run in '{folder}' (no {REPORT}); give the folder of a sweep")
    return sorted(runs, key=lambda run: run.order)


def _read(place: Path, name: str) -> Run:
    if (place / REPORT).is_file():
        return Run(name, FINISHED, _json(place / REPORT))
    if (place / ERROR).is_file():
        error = _json(place / ERROR)
        return Run(name, FAILED, {}, f"{error.get('kind', '')}: {error.get('message', '')}")
    return Run(name, UNFINISHED, {})


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
