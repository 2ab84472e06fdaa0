"""Atomic writing of files, and locks."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fusion.errors import UserError

MODEL = "merged.safetensors"  # the result of a merge, in the folder of its run

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds of waiting for another process before it is logged


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, renamed to it when the block succeeds.

    The temporary file has the suffix of ``path`` (for writers that depend on it). If the
    block raises, or the process dies, ``path`` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp is private to its owner; results are not
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_one(path: str | Path, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``path``, and yield whether it is held; waiting is logged.

    Args:
        path: the file or folder; the lock is a file next to it.
        name: its name in the log.
        wait: wait for another process that holds it; else yield ``False`` at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=_PATIENCE if wait else 0)
    except Timeout:
        if not wait:
            yield False
            return
        log.info("%s: waiting for another process, which holds %s", name, lock.lock_file)
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_writable_folder(folder: str | Path, option: str = "output_path") -> Path:
    """Check that files can be written to ``folder``, without creating or leaving anything.

    Raises:
        UserError: the folder cannot be made or written to; the message names ``option``.
    """
    folder = Path(folder)
    there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{option}: cannot write to the folder '{folder}' ({error.strerror}); "
            f"choose a folder that you may write to"
        ) from error
    return folder


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
