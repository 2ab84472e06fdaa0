"""Errors for mistakes of the user, with one clear sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake of the caller: the problem, its place, and the remedy.

    The command line prints the message alone and exits with code 2. All other exceptions are
    internal errors and keep their traceback.
    """


class NotApplicableError(UserError):
    """A method that does not apply to a pool, for example without a base or without images.

    A sweep over methods and pools contains such pairs; its summary counts them separately.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or its type if that is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: str, limit: int = 60) -> str:
    """Return foreign text in a form for messages: one line, bounded, printable."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return text if text.isprintable() else ascii(text)[1:-1]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not nearest and len(name) > 2:  # a part of a name: 'lora' of 'lora_rank'
        nearest = [longer for longer in known if name in longer][:1]
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def check_choice(option: str, value: object, known: Sequence[str]) -> None:
    """Check that ``value`` is one of the choices of ``option``.

    Raises:
        UserError: it is not; names the nearest.
    """
    if value not in known:
        raise UserError(
            f"{option}={value}: there is no such choice{suggestion(str(value), known)} "
            f"(there are {', '.join(known)})"
        )
