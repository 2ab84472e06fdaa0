"""Table of the accuracies of several models on several tasks, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ABSENT = "–"


def accuracy_table(
    evaluations: Mapping[str, Mapping[str, Any]],
    means: Mapping[str, Mapping[str, float | None]] | None = None,
) -> str:
    """Return a plain-text table: one row per model, one column per task, accuracy in percent.

    A model that cannot answer a task has a dash there.

    Args:
        evaluations: model → task → metrics with ``accuracy`` between 0 and 1.
        means: heading of a further column → model → number between 0 and 1, or ``None``.
    """
    return "\n".join(f"  {line}" for line in _aligned(accuracy_rows(evaluations, means)))


def accuracy_rows(
    evaluations: Mapping[str, Mapping[str, Any]],
    means: Mapping[str, Mapping[str, float | None]] | None = None,
) -> list[list[str]]:
    """Return the cells of :func:`accuracy_table`, the headings first."""
    tasks = list(dict.fromkeys(task for results in evaluations.values() for task in results))
    further = dict(means or {})
    rows = [["model", *tasks, *further]]
    for model, results in evaluations.items():
        cells = [_percent(results.get(task, {}).get("accuracy")) for task in tasks]
        cells += [_percent(column.get(model)) for column in further.values()]
        rows.append([model, *cells])
    return rows


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
