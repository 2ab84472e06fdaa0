"""Everything a run leaves behind: whole files in one folder, written by rank zero only."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.files import require_writable_folder, write_text

if TYPE_CHECKING:  # whoever only looks at a run's files pays for no torch
    from torch import nn

    from fusion.modelpool import BaseModelPool

log = logging.getLogger(__name__)

REPORT = "report.json"
MODEL = "merged.safetensors"
FINETUNED = "finetuned.safetensors"
CONFIG = "config.yaml"
COMMAND = "command.txt"  # of a sweep, in the folder of all its jobs
ERROR = "error.json"  # what a job of a sweep leaves that failed


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; made when it is first written to.
        report_path: where the report goes instead of ``<path>/report.json``.
        model_path: where the model goes instead of ``<path>/merged.safetensors``.
        overwrite: whether a finished run that lies there may be replaced.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        report_path: str | Path | None = None,
        model_path: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.report_path = Path(report_path) if report_path else self.path / REPORT
        self.model_path = Path(model_path) if model_path else self.path / MODEL
        self._overwrite = overwrite

    def check(self) -> None:
        """Check, before any work, that everything can be written and nothing is lost.

        Raises:
            UserError: a folder cannot be written to, a finished run lies there, or the model's
                name is not a safetensors file's.
        """
        for option, path in (
            ("output_path", self.path / REPORT),
            ("report_save_path", self.report_path),
            ("merged_model_save_path", self.model_path),
        ):
            require_writable_folder(path.parent, option)
            if path.is_dir():
                raise UserError(f"{option}: '{path}' is a folder; give the name of a file")
        if self.model_path.suffix != ".safetensors":
            raise UserError(f"merged_model_save_path: '{self.model_path}' must end in .safetensors")
        # The report comes last: a model without one is what a run left that was killed.
        killed = (self.path / CONFIG).is_file() and not self.report_path.exists()
        leftover = self.path / MODEL if killed else None
        for path in {self.report_path, self.model_path} - {leftover}:
            if path.exists() and not self._overwrite:
                raise UserError(
                    f"'{path}' is there already, from an earlier run; choose another output_path, "
                    f"or replace it with overwrite=true"
                )

    def clear(self) -> None:
        """Make the folder; remove an earlier run's report and models: old and new never mix."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.report_path.unlink(missing_ok=True)
        self.model_path.unlink(missing_ok=True)
        (self.path / FINETUNED).unlink(missing_ok=True)

    def save_config(self, text: str) -> None:
        """Write the resolved configuration, YAML as given."""
        write_text(self.path / CONFIG, text)

    def save_model(
        self, model: nn.Module, modelpool: BaseModelPool, provenance: Mapping[str, Any]
    ) -> None:
        """Write the model with where it came from in the file's metadata."""
        modelpool.save_model(model, self.model_path, metadata=_metadata(provenance))

    def save_finetuned(
        self, model: nn.Module, modelpool: BaseModelPool, provenance: Mapping[str, Any]
    ) -> None:
        """Write the model after fine-tuning, beside the one before it."""
        modelpool.save_model(model, self.path / FINETUNED, metadata=_metadata(provenance))

    def save_report(self, report: Mapping[str, Any]) -> None:
        """Write the report as JSON. It is the last file of a run: where it is, the run is whole."""
        text = json.dumps(report, indent=2, ensure_ascii=False, default=_jsonable)
        write_text(self.report_path, text + "\n")

    def load_report(self) -> dict[str, Any]:
        """Return the report as it was written."""
        report: dict[str, Any] = json.loads(self.report_path.read_text(encoding="utf-8"))
        return report

    def tell(self) -> None:
        """Log where the run's files are."""
        inside = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        log.info("Saved in %s: %s", self.path, ", ".join(inside))
        for path in (self.report_path, self.model_path):
            if path.parent != self.path and path.exists():
                log.info("Saved %s", path)


def _metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {"provenance": json.dumps(provenance, default=str, sort_keys=True)}


def _jsonable(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy's or torch's
        return value.item()
    raise TypeError(f"a report holds plain values, not {type(value).__name__}")
