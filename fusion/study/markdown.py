"""The study's table as Markdown: the baseline first, the best values marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from fusion.figures.study_style import finetuning_style
from fusion.study.naming import merge_names
from fusion.study.table import NO_FINETUNING, is_baseline

MEBIBYTE = 2**20
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A column of the table, with its format and the direction of better values.

    Attributes:
        figure: of the strategy table.
        title: the heading.
        scale: factor of the shown number.
        digits: after the point.
        better: ``high``, ``low``, or ``""`` where neither is.
    """

    figure: str
    title: str
    scale: float
    digits: int
    better: str


COLUMNS = (
    Column("merged_accuracy", "accuracy without fine-tuning (%)", 100, 1, "high"),
    Column("finetuned_accuracy", "fine-tuned accuracy (%)", 100, 1, "high"),
    Column("finetuned_f1", "fine-tuned F1 (%)", 100, 1, "high"),
    Column("training_seconds", "added time (s)", 1, 2, "low"),
    Column("peak_bytes", "peak memory (MiB)", 1 / MEBIBYTE, 0, "low"),
    Column("trained_parameters", "trained parameters", 1, 0, ""),
    Column("consistency_all_layers", "consistency", 1, 3, ""),
)


@dataclass(frozen=True)
class Cell:
    """One shown number.

    Attributes:
        text: the displayed text.
        value: the sort key; None where there is none.
        best: whether no other row has a better one.
    """

    text: str
    value: float | None
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One row of the shown table.

    Attributes:
        merge: name of the merge.
        finetuning: name of the fine-tuning.
        note: equivalent strategies,
            or a mark of the baseline.
        cells: one for each column.
        baseline: whether it is the baseline.
    """

    merge: str
    finetuning: str
    note: str
    cells: tuple[Cell, ...]
    baseline: bool


def shown_columns(strategies: pd.DataFrame) -> list[Column]:
    """Return the columns that have a number in any row."""
    return [column for column in COLUMNS if strategies[column.figure].notna().any()]


def lines(strategies: pd.DataFrame) -> list[Line]:
    """Return the rows in display order: the baseline first, the others in their order."""
    columns = shown_columns(strategies)
    names = merge_names(strategies)
    baseline = is_baseline(strategies)
    best = {column.figure: _best(strategies[column.figure], column) for column in columns}
    found = []
    for position, (_, row) in enumerate(strategies.iterrows()):
        base = bool(baseline.iloc[position])
        same = [finetuning_style(s)[1] for s in str(row["same_as"] or "").split()]
        notes = (["baseline"] if base else []) + [f"same as {s}" for s in same]
        cells = tuple(_cell(row, column, best[column.figure]) for column in columns)
        strategy = str(row["strategy"])
        trained = "" if strategy == NO_FINETUNING else finetuning_style(strategy)[1]
        found.append(Line(names[position], trained, "; ".join(notes), cells, base))
    return sorted(found, key=lambda line: not line.baseline)


def markdown_table(strategies: pd.DataFrame) -> str:
    """Return the table as Markdown; several seeds as mean ± standard error."""
    titles = ["model", "trained", *(column.title for column in shown_columns(strategies)), ""]
    rows: list[Sequence[str]] = [titles, ["---", "---", *["---:"] * (len(titles) - 3), "---"]]
    for line in lines(strategies):
        cells = [f"**{cell.text}**" if cell.best else cell.text for cell in line.cells]
        rows.append([line.merge, line.finetuning or ABSENT, *cells, line.note])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _best(values: pd.Series[float], column: Column) -> float | None:
    known = values.dropna()
    if column.better == "" or len(known) < 2:
        return None
    best = float(known.max() if column.better == "high" else known.min())
    return round(best * column.scale, column.digits)


def _cell(row: pd.Series[float], column: Column, best: float | None) -> Cell:
    value = row[column.figure]
    if pd.isna(value):
        return Cell(ABSENT, None)
    shown = round(float(value) * column.scale, column.digits)
    text = f"{shown:,.{column.digits}f}"
    error = row[f"{column.figure}_error"]
    if pd.notna(error) and column.figure != "trained_parameters":
        text += f" ± {float(error) * column.scale:.{column.digits or 1}f}"
    return Cell(text, float(value), best is not None and shown == best)
