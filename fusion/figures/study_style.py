"""Colours of the figures of a study.

Fine-tunings are shades of one blue, darker the more is trained: ordered in greyscale too.
Interpolations are three other hues, each with a separate marker and line style. Black is the base,
grey is chance.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusion.figures.style import MemberStyle

BASE = MemberStyle("#000000", "o", "-")
RANDOM = MemberStyle("#7f7f7f", "x", ":")
FRONT = "#7f7f7f"

# strategy of fine-tuning → (colour, what is trained)
FINETUNINGS = {
    "none": ("#f0f0f0", "nothing"),
    "head": ("#a6cee3", "the head"),
    "selective": ("#4292c6", "merged layers and the head"),
    "full": ("#08306b", "everything"),
}
_INTERPOLATIONS = {
    "lerp": MemberStyle("#D55E00", "^", "-"),
    "slerp": MemberStyle("#009E73", "D", "--"),
    "ties": MemberStyle("#CC79A7", "v", "-."),
}
_OTHERS = (MemberStyle("#E69F00", "P", "-"), MemberStyle("#56B4E9", "X", "--"))


def interpolation_styles(names: Iterable[str]) -> dict[str, MemberStyle]:
    """Return the style of each interpolation; foreign ones share the remaining styles."""
    styles: dict[str, MemberStyle] = {}
    for name in dict.fromkeys(names):
        new = [other for other in names if other not in _INTERPOLATIONS]
        if name in _INTERPOLATIONS:
            styles[name] = _INTERPOLATIONS[name]
        else:
            styles[name] = _OTHERS[list(dict.fromkeys(new)).index(name) % len(_OTHERS)]
    return styles


def finetuning_style(strategy: str) -> tuple[str, str]:
    """Return the colour of a strategy of fine-tuning, and what is trained, in words."""
    return FINETUNINGS.get(strategy, ("#bdbdbd", strategy))


def finetuning_order(strategies: Iterable[str]) -> list[str]:
    """Return the strategies, least trained first, unknown ones last."""
    known = list(FINETUNINGS)
    return sorted(
        dict.fromkeys(strategies), key=lambda s: known.index(s) if s in known else len(known)
    )
