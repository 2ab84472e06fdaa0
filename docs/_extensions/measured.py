"""The measured rows of one method, out of the tables of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADING = re.compile(r"^#+ (.*)$")
_COMMAND = re.compile(r"`((?:python scripts/|fusion_bench )[^`]+)`")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: the heading that it stands under.
        command: what makes its numbers, as the text before it says; ``""`` where it says nothing.
        heads: the first row.
        rows: the others.
    """

    title: str
    command: str
    heads: list[str]
    rows: list[list[str]]

    def of(self, method: str) -> list[list[str]]:
        """Return the rows whose first cell begins with the name of a method."""
        return [row for row in self.rows if re.match(rf"`?{method}(?![\w-])", row[0])]


def first_command(markdown: str) -> str:
    """Return the first command of a page."""
    return " ".join(_COMMAND.findall(markdown)[0].split())


def tables(markdown: str, *, command: str = "") -> Iterator[Table]:
    """Yield the tables of a page that a command makes.

    Args:
        markdown: the page.
        command: what makes the tables under a heading without a command.
    """
    title, text, lines = "", "", []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(_cells(line))
            continue
        made_by = " ".join([command, *_COMMAND.findall(text)][-1].split())
        if lines and made_by:
            yield Table(title, made_by, lines[0], lines[2:])
        lines = []
        if heading := _HEADING.match(line):
            title, text = heading[1], ""
        text += f"{line}\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
