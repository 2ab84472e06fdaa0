"""What every rule checks about its options."""

from __future__ import annotations

import math

from fusion.errors import UserError


def require_number(
    option: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    """Check that an option is a finite number in its range.

    Args:
        option: how the user knows it, such as ``"Ties.density"``.
        value: what came.
        above: the number must be larger than this.
        least: the number must be this or larger.
        most: the number must be this or smaller.

    Raises:
        UserError: it is something else.
    """
    low = "" if above is None else f" above {above:g}"
    low = low if least is None else f" of {least:g} or more"
    high = "" if most is None else f"{' and' if low else ''} of {most:g} or less"
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )
    if not inside:
        raise UserError(f"{option} is {value!r}; give a finite number{low}{high}")


def require_density(option: str, value: object) -> None:
    """Check that an option is the share of entries that is kept, in (0, 1].

    Raises:
        UserError: it is something else.
    """
    require_number(option, value, above=0, most=1)


def require_scale(option: str, value: object) -> None:
    """Check that an option is a factor of the merged change: any finite number.

    Raises:
        UserError: it is something else.
    """
    require_number(option, value)
