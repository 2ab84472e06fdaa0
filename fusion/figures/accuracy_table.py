"""Accuracies of several models on several tasks, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ABSENT = "–"


def accuracy_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a plain-text table: a row a model, a column a task, accuracy in percent.

    A model that has no outputs for a task shows a dash there.

    Args:
        evaluations: model → task → metrics with ``accuracy`` between 0 and 1.
    """
    tasks = list(dict.fromkeys(task for results in evaluations.values() for task in results))
    rows = [["model", *tasks]]
    for model, results in evaluations.items():
        cells = [
            f"{100 * results[task]['accuracy']:.1f}"
            if task in results and "accuracy" in results[task]
            else _ABSENT
            for task in tasks
        ]
        rows.append([model, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(f"  {line}" for line in lines)
