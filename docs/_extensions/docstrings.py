"""Lets docstrings be plain text where the manual would see markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_STARRED = re.compile(r"(?<![*\\\w])\*(?=shape)")


def keep_plain(
    app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Escape the star of a shape, (n, *shape), and keep the summaries of properties whole.

    Napoleon takes what stands before a colon in the first line of a property for its type; an
    empty line in front prevents that.
    """
    del app, name, thing, options
    lines[:] = [_STARRED.sub(r"\*", line) for line in lines]
    if what in ("property", "attribute", "data"):
        lines.insert(0, "")


def setup(app: Any) -> Mapping[str, Any]:
    """Look at every docstring before it becomes part of a page."""
    app.connect("autodoc-process-docstring", keep_plain, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True}
