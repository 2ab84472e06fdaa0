"""Options of the commands that are no run: ``export=``, ``push=`` and ``card=``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusion.errors import UserError, suggestion


def given_options(verb: str, arguments: Sequence[str], options: Sequence[str]) -> dict[str, str]:
    """Return option → value of a command that composes no configuration.

    Raises:
        UserError: there is no such option.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    for name in given:
        if name not in options:
            raise UserError(
                f"{verb} has no option '{name}'{suggestion(name, options)} (options: "
                f"{', '.join(options)})"
            )
    return given


def flag(given: Mapping[str, str], name: str, *, default: bool) -> bool:
    """Return the value of an option that is true or false.

    Raises:
        UserError: it is neither.
    """
    value = given.get(name, str(default).lower())
    if value not in ("true", "false"):
        raise UserError(f"{name}={value}: give true or false")
    return value == "true"
