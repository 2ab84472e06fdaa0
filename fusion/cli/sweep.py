"""Jobs of a sweep: finished jobs are skipped, and failures do not stop the others."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fusion.cli.mistakes import tell
from fusion.errors import UserError
from fusion.files import write_text
from fusion.run_folder import (
    COMMAND,
    CONFIG,
    ERROR,
    REPORT,
    finished_report,
    recover,
)

log = logging.getLogger(__name__)

# Keys that do not change the result of a job; places change when a folder is moved.
_NO_MATTER = re.compile(r"\s*(overwrite|print_config|output_path|output_root|cache_dir):")
_FAILED = 1  # the exit code when a job failed by more than a mistake of the user's
_MISTAKE = 2


def already_finished(folder: Path, config: str, *, overwrite: bool) -> bool:
    """Return whether the job of this configuration (YAML) has a complete run in ``folder``.

    A job whose files are damaged or missing has to run again.

    Raises:
        UserError: the run there is another job's, and must not be overwritten.
    """
    if overwrite:
        return False
    recover(folder)
    if not (folder / REPORT).is_file():
        return False
    if is_of(folder, config):
        if finished_report(folder) is None:
            log.warning("%s: its files are damaged or missing; running again", folder)
            return False
        return True
    raise UserError(
        f"'{folder}' holds the report of a job with other options; a sweep can be resumed in its "
        f"own output_path only: choose another one, or replace it with overwrite=true"
    )


@contextmanager
def failing_alone(folder: Path, *, job: int) -> Iterator[None]:
    """Record an error in the block in ``error.json``, so that the other jobs continue."""
    (folder / ERROR).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        mistake = isinstance(error, UserError)
        told = {
            "job": job,
            "kind": type(error).__name__,
            "mistake": mistake,
            "message": str(error) or repr(error),
            "traceback": traceback.format_exc(),
        }
        write_text(folder / ERROR, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        log.error("This job failed: %s", error, exc_info=not mistake)


class Summarise(Callback):
    """Hydra callback that writes table, figures and page at the end of a sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record the command, to resume and to reproduce the sweep."""
        del kwargs
        if not config.dry_run:
            command = shlex.join(["fusion_bench", *sys.argv[1:]])
            with _not_only_a_warning():
                write_text(Path(config.hydra.sweep.dir) / COMMAND, command + "\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarise the sweep's folder; exit with an error if a job failed."""
        del kwargs
        folder = Path(config.hydra.sweep.dir)
        if not config.dry_run:
            with _not_only_a_warning():
                summarise_and_tell(folder)
        elif not list(folder.rglob(REPORT)):  # Hydra's own note is all there is
            (folder / "multirun.yaml").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _not_only_a_warning() -> Iterator[None]:
    """End the process on an error in the block: Hydra only warns of exceptions in callbacks.

    Raises:
        SystemExit: with 2 after a user's mistake, whose message is printed, with 1 otherwise.
    """
    try:
        yield
    except UserError as error:
        tell(error)
    except Exception as error:
        log.exception("The summary of the sweep failed; repeat it with summarize=FOLDER")
        raise SystemExit(_FAILED) from error


def summarise_and_tell(folder: Path) -> None:
    """Summarise ``folder``, print written files and failures, and exit accordingly."""
    from fusion.study import summarise

    summary = summarise(folder)
    sys.stdout.write(summary.text)
    if summary.failed:
        records = [
            json.loads((folder / name / ERROR).read_text(encoding="utf-8"))
            for name in summary.failed
        ]
        sys.exit(_MISTAKE if all(record["mistake"] for record in records) else _FAILED)


def is_of(folder: Path, config: str) -> bool:
    """Return whether the files in ``folder`` are of the job of this configuration (YAML).

    If they are not a complete run, the job may overwrite them.
    """
    file = folder / CONFIG
    if not file.is_file():
        return False
    return _comparable(file.read_text(encoding="utf-8", errors="replace")) == _comparable(config)


def _comparable(config: str) -> list[str]:
    """Return the lines that matter: what a folder holds is compared as text, not read as YAML."""
    return [line for line in config.splitlines() if not _NO_MATTER.match(line)]
