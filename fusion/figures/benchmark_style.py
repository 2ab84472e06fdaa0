"""Colours and markers of the benchmark's figures, which show the requirements of methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from matplotlib.lines import Line2D

from fusion.figures.style import MemberStyle

# The strongest requirement of a method → colour and marker, the least first.
NEED_STYLES = {
    "nothing": MemberStyle("#000000", "o", ""),
    "a pretrained model": MemberStyle("#0072B2", "s", ""),
    "images without labels": MemberStyle("#009E73", "^", ""),
    "labelled images": MemberStyle("#D55E00", "D", ""),
    "gradients": MemberStyle("#AA3377", "v", ""),
}
_OTHER = MemberStyle("#56B4E9", "P", "")
CONTROL_LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
CONTROL_COLOR = "#595959"


def need_style(need: str) -> MemberStyle:
    """Return colour and marker of a method's requirement."""
    return NEED_STYLES.get(need, _OTHER)


def needs_in_order(needs: Iterable[str]) -> list[str]:
    """Return the requirements that occur, the least first, unknown ones last."""
    known = list(NEED_STYLES)
    return sorted(
        dict.fromkeys(needs), key=lambda need: known.index(need) if need in known else len(known)
    )


def need_handles(needs: Iterable[str]) -> list[Line2D]:
    """Return the entries of a legend."""
    return [
        Line2D(
            [], [], color=style.color, marker=style.marker, linestyle="none", label=f"needs {need}"
        )
        for need in needs_in_order(needs)
        for style in [need_style(need)]
    ]
