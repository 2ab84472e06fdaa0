"""The folder of a run, written completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusion.errors import UserError, shown
from fusion.files import MODEL, atomic_path, require_writable_folder, write_text

log = logging.getLogger(__name__)

REPORT = "report.json"
FINETUNED = "finetuned.safetensors"
CONFIG = "config.yaml"
CARD = "README.md"  # the model card, under the name that the Hugging Face hub asks for
LIBRARY = "fusion-cnn"
CARD_START = f"---\nlibrary_name: {LIBRARY}\n"
LOG = "fusion_bench.log"
COMMAND = "command.txt"  # of a sweep, in the folder of all its jobs
ERROR = "error.json"  # left by a failed job of a sweep
UNFINISHED = "unfinished"  # folder for the files of a run that failed after its merge
FILES = "files"  # entry of the report: name of a file -> its size and SHA-256

WORKING = ".running-"  # folder in which a run is written; its files move when all are there
READY = ".ready-"  # the same once the run is whole
_REPLACES = ".replaces.json"  # in it: the files of an earlier run that go
_LOCK = ".lock"
_HOLDER = ".lock.json"  # who holds the lock
# Files allowed in a folder in addition to a run's own: of a failed job, of a sweep, of Hydra.
_ALLOWED = (ERROR, COMMAND, UNFINISHED, "multirun.yaml", LOG)


class RunFolder:
    """The folder of one run.

    A run is written into a hidden folder inside and moved when it is whole, its report last: an
    earlier run in the folder stays complete until then, and a killed run leaves nothing that could
    be taken for a result. A lock excludes concurrent runs.

    Args:
        path: the folder; created when it is first written to.
        report_path: path of the report instead of ``<path>/report.json``.
        model_path: path of the
            model instead of ``<path>/merged.safetensors``.
        overwrite: whether a finished run there
            may be replaced.
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

    def check(self, *, tables: Path | None = None) -> None:
        """Check, before any work, that everything can be written and nothing is lost.

        Args:
            tables: the folder to which the algorithm writes instead (``method.output_path``).

        Raises:
            UserError: a folder cannot be written to, a file exists already, another run writes to
                it, or two of the paths are the same.
        """
        self._check_paths()
        if tables is not None:
            self._check_tables(tables)
        recover(self.path)
        present = _visible(self.path)
        if CARD in present and not _is_card(self.path / CARD):
            raise UserError(
                f"output_path: '{self.path / CARD}' is not of a run, and the run's model card "
                f"would replace it; choose another folder"
            )
        if self._overwrite:
            return
        if REPORT in present:
            raise UserError(
                f"'{self.path}' holds a finished run; choose another output_path, or replace it "
                f"with overwrite=true"
            )
        odd = [name for name in present if name not in _ALLOWED]
        if odd:
            raise UserError(
                f"output_path: '{self.path}' is not empty (it has {', '.join(odd[:3])}"
                f"{' …' if len(odd) > 3 else ''}); choose a new folder, or write into this one "
                f"with overwrite=true"
            )
        for option, path in self._elsewhere().items():
            if path.exists():
                raise UserError(
                    f"{option}: '{path}' is there already; choose another name, or replace it "
                    f"with overwrite=true"
                )

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Hold the folder's lock, and yield the folder into which the run is written.

        When the block succeeds, its files are moved to their final places. When it fails after the
        model was written, they are kept in the folder ``unfinished``; otherwise nothing is left.

        Raises:
            UserError: another run holds the lock.
        """
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with _locked(self.path):
                _sweep(self.path)
                working = Path(tempfile.mkdtemp(dir=self.path, prefix=WORKING))
                try:
                    with _log_file(working / LOG):
                        yield working
                except BaseException:
                    self._keep_unfinished(working)
                    raise
                self._publish(working)
        finally:
            if new:
                with contextlib.suppress(OSError):  # it holds something
                    self.path.rmdir()

    def load_report(self) -> dict[str, Any]:
        """Return the report as it was written."""
        report: dict[str, Any] = json.loads(self.report_path.read_text(encoding="utf-8"))
        return report

    def log_contents(self) -> None:
        """Log where the run's files are."""
        log.info("Saved in %s: %s", self.path, ", ".join(_visible(self.path)))
        for path in self._elsewhere().values():
            log.info("Saved %s", path)

    def _elsewhere(self) -> dict[str, Path]:
        """Return option → path of files outside of the folder or under another name."""
        return {
            option: path
            for option, path, name in (
                ("report_save_path", self.report_path, REPORT),
                ("merged_model_save_path", self.model_path, MODEL),
            )
            if path != self.path / name
        }

    def _check_paths(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_path: '{self.path}' is a file; give the name of a folder")
        for option, path in {"output_path": self.path / REPORT, **self._elsewhere()}.items():
            require_writable_folder(path.parent, option)
            if path.is_dir():
                raise UserError(f"{option}: '{path}' is a folder; give the name of a file")
        if self.model_path.suffix != ".safetensors":
            raise UserError(f"merged_model_save_path: '{self.model_path}' must end in .safetensors")
        if self.report_path.suffix != ".json":
            raise UserError(f"report_save_path: '{self.report_path}' must end in .json")
        reserved = {(self.path / name).resolve() for name in (REPORT, MODEL, FINETUNED, CONFIG)}
        for option, path in self._elsewhere().items():
            if path.resolve() in reserved:
                raise UserError(
                    f"{option}: '{path}' is the name of another file of this run; choose another"
                )
            reserved.add(path.resolve())
            self._require_no_run(path.parent, option)

    def _check_tables(self, folder: Path) -> None:
        option = "method.output_path"
        if folder.resolve() == self.path.resolve():
            raise UserError(
                f"{option}: '{folder}' is this run's own folder, where the method writes anyway; "
                f"leave it out"
            )
        require_writable_folder(folder, option)
        self._require_no_run(folder, option)

    def _require_no_run(self, folder: Path, option: str) -> None:
        if folder.resolve() != self.path.resolve() and (folder / REPORT).is_file():
            raise UserError(f"{option}: '{folder}' holds another run; choose a folder without one")

    def _publish(self, working: Path) -> None:
        """Move a complete run to its final place: files with explicit paths, then all others."""
        for option, path in self._elsewhere().items():
            written = working / (REPORT if option == "report_save_path" else MODEL)
            if written.is_file():
                with atomic_path(path) as temporary:
                    shutil.copyfile(written, temporary)
                written.unlink()
        new = {p.relative_to(working).as_posix() for p in working.rglob("*") if p.is_file()}
        write_text(working / _REPLACES, json.dumps(sorted(_files_of_run(self.path) - new)))
        ready = working.with_name(working.name.replace(WORKING, READY, 1))
        working.rename(ready)
        _move_in(ready, self.path)

    def _keep_unfinished(self, working: Path) -> None:
        if not (working / MODEL).is_file():
            shutil.rmtree(working, ignore_errors=True)
            return
        kept = self.path / UNFINISHED
        shutil.rmtree(kept, ignore_errors=True)
        working.rename(kept)
        log.error("The run failed after its merge; its files are kept in %s", kept)


def save_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write a run's report as JSON, with size and SHA-256 of every other file in ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (REPORT, LOG)  # the log still grows
    }
    text = json.dumps({**report, FILES: files}, indent=2, ensure_ascii=False, default=_jsonable)
    write_text(folder / REPORT, text + "\n")


def finished_report(folder: Path, *, changed: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the report of a run whose files are all present and undamaged; ``None`` otherwise.

    Args:
        folder: the run's.
        changed: names of files that may have been changed since.
    """
    recover(folder)
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        files = report[FILES]
        whole = all(
            _is_inside(folder, name)
            and (folder / name).stat().st_size == entry["bytes"]
            and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
            if name not in changed
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no report, or a damaged one
    return report if whole and isinstance(report, dict) else None


def recover(folder: Path) -> None:
    """Finish moving a run that was complete when its process died."""
    if folder.is_dir() and (ready := list(folder.glob(f"{READY}*"))):
        with _locked(folder):
            for run in ready:
                if run.is_dir():
                    _move_in(run, folder)


def _move_in(ready: Path, folder: Path) -> None:
    """Replace the run in ``folder`` by the whole one in ``ready``, its report last.

    A process that dies meanwhile leaves ``ready`` and no report; the next one continues.
    """
    report = ready / REPORT
    new = {p.relative_to(ready).as_posix() for p in ready.rglob("*") if p.is_file()}
    try:
        old = json.loads((ready / _REPLACES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{ready}' does not say which files it replaces; remove it") from error
    for name in (*old, *new):  # the folder may be of other origin
        if not _is_inside(folder, name):
            raise UserError(
                f"'{ready}' would change '{shown(str(name))}' outside of its folder; remove it"
            )
    (folder / REPORT).unlink(missing_ok=True)
    for name in old:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(new - {REPORT, _REPLACES}):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (ready / name).replace(target)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    (folder / ERROR).unlink(missing_ok=True)
    if report.is_file():
        report.replace(folder / REPORT)
    # The rest is obsolete: under this name the next run removes it.
    leftover = ready.with_name(ready.name.replace(READY, WORKING, 1))
    ready.rename(leftover)
    shutil.rmtree(leftover)


def _is_card(path: Path) -> bool:
    """Return whether a file begins as the model card of a run does; its report may be lost."""
    with path.open("rb") as file:
        return file.read(len(CARD_START)) == CARD_START.encode()


def _files_of_run(folder: Path) -> set[str]:
    """Return the files that the report in ``folder`` lists."""
    try:
        files = set(json.loads((folder / REPORT).read_text(encoding="utf-8"))[FILES])
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # no run, or one of another kind: nothing of it is removed
    return {name for name in files if _is_inside(folder, name)}


def _is_inside(folder: Path, name: object) -> bool:
    """Return whether a name that a file gives leads to something in ``folder``, links followed."""
    if not isinstance(name, str) or not Path(name).name or Path(name).name == "..":
        return False
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def _sweep(folder: Path) -> None:
    """Remove leftovers of killed runs; the caller holds the lock."""
    for leftover in folder.glob(f"{WORKING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
        if not (folder / _LOCK).exists():  # its holder removed the file while we opened it
            raise Timeout(lock.lock_file)
    except Timeout as error:
        lock.release()
        raise UserError(
            f"output_path: another run is writing to '{folder}'{_holder(folder)}; wait for it, or "
            f"choose another folder"
        ) from error
    try:
        mine = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # Not by a temporary file, which a kill would leave; a partial file reads as none.
        (folder / _HOLDER).write_text(json.dumps(mine), encoding="utf-8")
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f" (process {found['process']} on {found['host']} since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # it has only just begun, or ended


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Also write the log to a file, in UTF-8 whatever the locale."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _visible(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _jsonable(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy's or torch's
        return value.item()
    raise TypeError(f"a report holds plain values, not {type(value).__name__}")
