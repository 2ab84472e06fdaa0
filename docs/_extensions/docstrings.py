"""Lets docstrings write a shape as in Python, (n, *shape), where the manual would see markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_STARRED = re.compile(r"(?<![*\\\w])\*(?=shape)")


def escape_shapes(
    app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Escape the star before ``shape`` in every line of a docstring."""
    del app, what, name, thing, options
    lines[:] = [_STARRED.sub(r"\*", line) for line in lines]


def setup(app: Any) -> Mapping[str, Any]:
    """Look at every docstring before it becomes part of a page."""
    app.connect("autodoc-process-docstring", escape_shapes)
    return {"parallel_read_safe": True}
