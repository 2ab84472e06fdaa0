"""An option that is one of a few words."""

from __future__ import annotations

from collections.abc import Sequence

from fusion.errors import UserError, suggestion


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Check that ``value`` is one of the words that ``option`` knows.

    Raises:
        UserError: it is not; names the nearest.
    """
    if value not in known:
        raise UserError(
            f"{option}={value}: there is no such choice{suggestion(value, known)} "
            f"(there are {', '.join(known)})"
        )
