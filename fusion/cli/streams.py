"""Make a run robust against closed or limited standard output and standard error."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

_WORDS = "–→×°…²"  # characters of tables and messages
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ESHUTDOWN)


class Outlet:
    """A text stream whose reader may close it; later output is dropped without an error.

    Args:
        stream: the stream behind it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``; drop it if the stream was closed."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        """Redirect all further output to the null device, also of other writers to the file."""
        if error.errno not in _GONE:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def make_streams_robust() -> None:
    """Make the process's streams robust against a closing reader, and independent of the locale.

    A stream that was closed from the start becomes the null device. One whose encoding lacks the
    characters of tables is written in UTF-8.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Outlet):
            continue
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (for good)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=_encoding(stream), errors="replace")
        setattr(sys, name, Outlet(stream))


def _encoding(stream: TextIO) -> str:
    try:
        _WORDS.encode(stream.encoding)
    except (LookupError, UnicodeEncodeError):
        return "utf-8"
    return stream.encoding
