"""The benchmark as Markdown: the answers, and a table per setting."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fusion.study.benchmark.answers import Answer
from fusion.study.benchmark.comparison import (
    against_task_arithmetic,
    at_its_best,
    groups,
    overview,
    under,
)
from fusion.study.benchmark.statistics import VERDICTS
from fusion.study.benchmark.table import (
    CHOSEN,
    DEFAULTS,
    MERGED_STATISTICS,
    NEEDS,
    ORACLE,
    PER_TASK,
    RECALIBRATE,
    Measured,
)
from fusion.study.benchmark.words import mean_and_error, plus_minus, signed
from fusion.study.markdown import ABSENT

# Heading, track and treatment of each column of scores.
_SCORES = (
    ("defaults", DEFAULTS, RECALIBRATE),
    ("chosen", CHOSEN, RECALIBRATE),
    ("defaults, a set per task", DEFAULTS, PER_TASK),
    ("chosen, a set per task", CHOSEN, PER_TASK),
    ("defaults, merged statistics", DEFAULTS, MERGED_STATISTICS),
    ("oracle head", ORACLE, RECALIBRATE),
)
LEGEND = (
    "Scores are the mean over tasks of the accuracy in percent of that of the task's own expert, "
    "with the mean over the seeds and its standard error between them. Batch norm is recalibrated "
    "where a column does not say otherwise."
)
OVERVIEW = (
    "Each method with batch norm recalibrated, and with its option chosen where it has one. Score, "
    "and gain over the simple average in points: means over the settings whose networks have one "
    "base; the gain also over those of networks trained apart. Then in how many settings a method "
    "is better than the simple average, equivalent to it, worse, and undecided."
)


def markdown(measured: Measured, answers: Sequence[Answer], *, command: str) -> str:
    """Return the overview, the answers and, per setting, a row per method and per control.

    Args:
        measured: what the runs measured.
        answers: to the benchmark's questions.
        command: what reproduces the sweep.
    """
    parts = ["# Results of the benchmark\n", f"`{command}`\n", f"{OVERVIEW}\n"]
    parts += [_table(overview_lines(measured)), "## Answers\n"]
    for answer in answers:
        parts.append(f"**{answer.name}. {answer.question}**\n")
        parts.append("\n".join(f"- {sentence}" for sentence in answer.sentences) + "\n")
    parts.append(f"{LEGEND}\n")
    best, against = at_its_best(measured), against_task_arithmetic(measured)
    for setting in measured.settings:
        compared = against[against["setting"] == setting].set_index("name")
        rows = best[best["setting"] == setting]
        parts.append(f"## {setting}\n\n{_methods(measured, setting, rows, compared)}")
        if controls := _controls(measured, setting):
            parts.append(controls)
    return "\n".join(parts)


def ordered(methods: pd.DataFrame) -> list[str]:
    """Return the methods by what they need, the least first, and then by name."""
    rows = methods.drop_duplicates("method")
    place = {need: number for number, need in enumerate(NEEDS)}
    keys = {
        str(row["method"]): (place.get(str(row["group"]), len(place)), str(row["method"]))
        for _, row in rows.iterrows()
    }
    return sorted(keys, key=keys.__getitem__)


def overview_lines(measured: Measured) -> list[list[str]]:
    """Return head, rule and a row per method: what it gains over all settings."""
    table = overview(measured)
    needs = groups(measured)
    lines = [["method", "needs", "score", "gain", "gain, trained apart", *VERDICTS]]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 2)])
    for method in ordered(measured.methods):
        row = table.loc[method]
        numbers = [ABSENT if pd.isna(row["score"]) else f"{row['score']:.1f}"]
        numbers += [ABSENT if pd.isna(row[c]) else signed(row[c]) for c in ("gain", "gain_apart")]
        counts = [ABSENT if pd.isna(row[v]) else f"{row[v]:.0f}" for v in VERDICTS]
        lines.append([method, needs[method], *numbers, *counts])
    return lines


def _methods(measured: Measured, setting: str, best: pd.DataFrame, against: pd.DataFrame) -> str:
    """Return a row per method, with its differences from task arithmetic (``against``)."""
    here = measured.methods[measured.methods["setting"] == setting]
    if here.empty:
        return ""
    columns = [
        (title, rows)
        for title, track, treatment in _SCORES
        if not (rows := under(here, treatment, track)).empty
    ]
    head = ["method", "needs", *(title for title, _ in columns), "worst task", "joint",
            "against task arithmetic"]  # fmt: skip
    lines = [head, ["---", "---", *["---:"] * (len(head) - 3), "---"]]
    for method in ordered(here):
        at_best = best[best["method"] == method]
        row = [method, str(here.loc[here["method"] == method, "needs"].iloc[0])]
        row += [mean_and_error(rows.loc[rows["method"] == method, "score"]) for _, rows in columns]
        row += [
            mean_and_error(at_best["worst"]),
            mean_and_error(at_best["joint"], scale=100),
            versus(against, method),
        ]
        lines.append(row)
    return _table(lines)


def versus(against: pd.DataFrame, method: str) -> str:
    """Return the difference and the verdict on it, as text."""
    if method not in against.index:
        return ABSENT
    row = against[against.index == method].iloc[0]
    return f"{signed(row['mean'])}{plus_minus(row['error'])}, {row['verdict']}"


def _controls(measured: Measured, setting: str) -> str:
    here = measured.controls[measured.controls["setting"] == setting]
    if here.empty:
        return ""
    lines = [["control", "score", "worst task", "joint"], ["---", "---:", "---:", "---:"]]
    for track, rows in here.groupby("track", sort=False):
        joint = mean_and_error(rows["joint"], scale=100)
        cells = [mean_and_error(rows["score"]), mean_and_error(rows["worst"]), joint]
        lines.append([str(track), *cells])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
