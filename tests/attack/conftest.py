"""What attacks on the product have in common: how an answer is judged, and the tally of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

import pytest

Kind = Literal["right", "sentence", "bare", "wrong"]
"""An answer is right (the run may start), one sentence that names what is wrong, a traceback that
is no sentence, or wrong (accepted although it has no meaning, or a sentence about something else).
"""
_TALLY = pytest.StashKey[Counter[tuple[str, Kind]]]()


@pytest.fixture
def tally(pytestconfig: pytest.Config) -> Callable[[str, Kind], None]:
    """Counts an answer (row of the table, kind)."""
    counts = pytestconfig.stash.setdefault(_TALLY, Counter())

    def count(row: str, kind: Kind) -> None:
        counts[row, kind] += 1

    return count


@pytest.fixture
def attack(tally: Callable[[str, Kind], None]) -> Callable[[str, Kind], AbstractContextManager]:
    """Counts what becomes of a block: the kind that is expected, or how it failed."""

    @contextmanager
    def counted(row: str, expected: Kind) -> Iterator[None]:
        try:
            yield
        except (AssertionError, pytest.fail.Exception):  # what `pytest.raises` did not see
            tally(row, "wrong")
            raise
        except BaseException:
            tally(row, "bare")
            raise
        tally(row, expected)

    return counted


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table of counts; of several processes (xdist) none knows them all."""
    counts = config.stash.get(_TALLY, Counter())
    if not counts:
        return
    columns = ("tried", *get_args(Kind))
    terminalreporter.section("attacks")
    terminalreporter.line("".join([" " * 12, *(f"{name:>10}" for name in columns)]))
    for row in sorted({row for row, _ in counts}):
        found = [counts[row, kind] for kind in get_args(Kind)]
        numbers = "".join(f"{number:>10}" for number in [sum(found), *found])
        terminalreporter.line(f"{row:<12}{numbers}")
