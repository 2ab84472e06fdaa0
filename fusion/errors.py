"""What a user did wrong, in one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake of the caller: what is wrong, where, and the cure.

    The command line prints the message alone and exits with code 2; everything else that is
    raised counts as an internal error and keeps its traceback.
    """


class NotApplicableError(UserError):
    """A method that this pool is no case for: it has no base, or no images of its own.

    A sweep over methods and pools meets such pairs; its summary counts them apart from failures.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of what ``error`` says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: str, limit: int = 60) -> str:
    """Return text that somebody else wrote as a message shows it: one line, bounded, printable."""
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
    """Check that ``value`` is one of the words that ``option`` knows.

    Raises:
        UserError: it is not; names the nearest.
    """
    if value not in known:
        raise UserError(
            f"{option}={value}: there is no such choice{suggestion(str(value), known)} "
            f"(there are {', '.join(known)})"
        )
