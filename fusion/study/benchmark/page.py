"""The benchmark as one page: no network, everything inline, readable on a phone and on paper."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import pandas as pd

from fusion.study.benchmark.answers import Answer
from fusion.study.benchmark.comparison import (
    against_task_arithmetic,
    at_its_best,
    one_per_seed,
    simple_average,
)
from fusion.study.benchmark.drawing import SCORES
from fusion.study.benchmark.markdown import LEGEND, OVERVIEW, overview_lines, versus
from fusion.study.benchmark.statistics import LEVEL, MARGIN, standard_error
from fusion.study.benchmark.table import CONTROLS, Measured
from fusion.study.benchmark.words import mean_and_error, plus_minus, signed
from fusion.study.drawing import Drawing
from fusion.study.markdown import ABSENT
from fusion.study.page import figure_element, head_element, part, trouble_element, word_cell
from fusion.study.runs import FINISHED, Run

TITLE = "Benchmark of merging methods"
CONTROL = "control"
_WORDS = 2  # columns of the overview that are words: method and needs
_OPEN, _FIRST = 4, 2  # sentences: shown without a click; of more, those that are

# Filters: data attribute → column of the conditions, and what stands above the choice.
_FILTERS = {
    "setting": ("setting", "setting"),
    "group": ("needs", "the method needs"),
    "track": ("track", "options"),
    "batch_norm": ("norm", "batch norm"),
}
_TREATMENTS = {
    "recalibrate": "recalibrated",
    "recalibrate_per_task": "a set per task",
    "merge": "merged",
    "pretrained": "none",
    "auto": "recalibrated",
}


@dataclass(frozen=True)
class _Column:
    """A column of numbers: its heading, where it is from, and how it is shown."""

    title: str
    name: str
    scale: float = 1.0
    digits: int = 1
    with_error: bool = True


_COLUMNS = (
    _Column("score", "score"),
    _Column("worst task", "worst"),
    _Column("accuracy (%)", "accuracy", 100),
    _Column("joint (%)", "joint", 100),
    _Column("calibration error (%)", "calibration_error", 100),
    _Column("parameters", "parameters", digits=0, with_error=False),
    _Column("multiply-adds", "multiply_adds", digits=0, with_error=False),
    _Column("seconds", "seconds", digits=2, with_error=False),
)


def page(
    runs: Sequence[Run],
    measured: Measured,
    answers: Sequence[Answer],
    drawings: Iterable[Drawing],
    *,
    command: str,
) -> str:
    """Return the page as HTML.

    Args:
        runs: all runs, failed ones included.
        measured: what the finished ones measured.
        answers: to the benchmark's questions.
        drawings: the figures.
        command: what reproduces the sweep.
    """
    drawn = list(drawings)
    table = _shown(measured).sort_values("group", kind="stable", key=lambda g: g == CONTROL)
    columns = [column for column in _COLUMNS if measured.conditions[column.name].notna().any()]
    words = ["setting", "method", "needs", "options", "batch norm"]
    against = ["against simple average", "against task arithmetic"]
    heads = [head_element(title, words=True) for title in words]
    numbers = [columns[0].title, *against, *(column.title for column in columns[1:]), "seeds"]
    heads += [head_element(title, words=False) for title in numbers]
    overview_heads, _, *overview_rows = overview_lines(measured)
    template = files("fusion.study.benchmark").joinpath("page.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        style=part("page.css"),
        script=part("sort.js"),
        title=escape(TITLE),
        counts=escape(_counts(measured)),
        trouble=trouble_element(runs),
        overview_legend=escape(OVERVIEW),
        overview_heads="".join(
            head_element(title, words=place < _WORDS) for place, title in enumerate(overview_heads)
        ),
        overview_rows="\n".join(_overview_row(line) for line in overview_rows),
        answers="\n".join(_answer(answer) for answer in answers),
        figures="\n".join(figure_element(d) for d in drawn if not d.stem.startswith(SCORES)),
        settings="\n".join(
            f'<div data-setting="{escape(d.stem.removeprefix(SCORES))}">{figure_element(d)}</div>'
            for d in drawn
            if d.stem.startswith(SCORES)
        ),
        filters="\n".join(
            _filter(name, title, table[column].dropna().unique())
            for column, (name, title) in _FILTERS.items()
        ),
        legend=escape(f"{LEGEND} {_VERSUS}"),
        heads="".join(heads),
        rows="\n".join(_rows(measured, table, columns)),
        command=escape(f"{command}\nfusion_bench summarize=FOLDER  # this page anew"),
        about="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
            for name, value in _about(runs).items()
        ),
    )


_VERSUS = (
    "Against the simple average: of the same seeds and the same batch norm. Against task "
    f"arithmetic: both with their options chosen and batch norm recalibrated, with the verdict of "
    f"paired tests over seeds (level {LEVEL:g}, Holm's correction within a setting; equivalent is "
    f"within ± {MARGIN:g} points)."
)


def _counts(measured: Measured) -> str:
    rows = measured.conditions
    methods = rows.loc[rows["method"] != CONTROLS, "method"].nunique()
    parts = (
        (rows["setting"].nunique(), "setting"),
        (methods, "method"),
        (rows["seed"].nunique(), "seed"),
        (rows["run"].nunique(), "run"),
    )
    told = [f"{number} {what}{'' if number == 1 else 's'}" for number, what in parts]
    return ", ".join(told[:-1]) + f": {told[-1]}."


def _answer(answer: Answer) -> str:
    shown = _OPEN if len(answer.sentences) <= _OPEN else _FIRST
    first = "".join(f"<li>{escape(s)}</li>" for s in answer.sentences[:shown])
    rest = answer.sentences[shown:]
    text = f"<section><h3>{escape(f'{answer.name}. {answer.question}')}</h3><ul>{first}</ul>"
    if rest:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in rest)
        text += f"<details><summary>{len(rest)} more</summary><ul>{items}</ul></details>"
    return f"{text}</section>"


def _overview_row(line: Sequence[str]) -> str:
    words = "".join(map(word_cell, line[:_WORDS]))
    return f"<tr>{words}{''.join(_cell(_first(text), text) for text in line[_WORDS:])}</tr>"


def _filter(name: str, title: str, values: Iterable[str]) -> str:
    options = "".join(f"<option>{escape(str(value))}</option>" for value in values)
    return (
        f'<label>{escape(title)}<select name="{name}"><option value="">all</option>{options}'
        "</select></label>"
    )


def _shown(measured: Measured) -> pd.DataFrame:
    """Return the conditions as the table tells them: controls as a track, treatments in words."""
    rows = measured.conditions
    ours = rows["method"] == CONTROLS
    treatments = rows["batch_norm"].map(_TREATMENTS).fillna(rows["batch_norm"])
    return rows.assign(
        name=rows["method"].where(~ours, rows["track"]),
        group=rows["group"].where(~ours, CONTROL),
        gain=_gains(measured),
        track=rows["track"].where(~ours, CONTROL),
        batch_norm=treatments.fillna(ABSENT),
    )


def _rows(measured: Measured, table: pd.DataFrame, columns: Sequence[_Column]) -> Iterable[str]:
    """Yield a row per setting, method and condition."""
    best = at_its_best(measured)
    verdicts = {
        str(setting): rows.set_index("name")
        for setting, rows in against_task_arithmetic(measured).groupby("setting")
    }
    at_best = {*zip(best["run"], best["condition"], strict=True)}
    keys = ["setting", "name", "group", "track", "batch_norm", "condition"]
    for key, rows in table.groupby(keys, sort=False):
        setting, name, group, track, norm, _ = map(str, key)
        data = {"setting": setting, "needs": group, "track": track, "norm": norm}
        attributes = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())
        cells = [word_cell(text) for text in (setting, name, group, track, norm)]
        is_best = any(pair in at_best for pair in zip(rows["run"], rows["condition"], strict=True))
        verdict = versus(verdicts[setting], name) if is_best and setting in verdicts else ABSENT
        numbers = [_number(rows, column) for column in columns]
        numbers[1:1] = [_gain(rows), _cell(_first(verdict), verdict)]
        numbers.append(_cell(rows["seed"].nunique(), str(rows["seed"].nunique())))
        kind = ' class="baseline"' if group == CONTROL else ""
        yield f"<tr{kind}{attributes}>{''.join(cells)}{''.join(numbers)}</tr>"


def _gains(measured: Measured) -> pd.Series[float]:
    """Return the score of each condition less that of the simple average of its seed.

    Both have the same treatment of batch norm.
    """
    gains = pd.Series(math.nan, index=measured.conditions.index)
    for treatment, rows in measured.methods.groupby("batch_norm"):
        average = one_per_seed(simple_average(measured, str(treatment))).to_dict()
        keys = zip(rows["setting"], rows["seed"], strict=True)
        gains[rows.index] = rows["score"] - [average.get(key, math.nan) for key in keys]
    return gains


def _number(rows: pd.DataFrame, column: _Column) -> str:
    values = rows[column.name].dropna().astype(float)
    if values.empty:
        return _cell(None, ABSENT)
    mean = column.scale * float(values.mean())
    if column.with_error:
        return _cell(mean, mean_and_error(values, digits=column.digits, scale=column.scale))
    return _cell(mean, f"{mean:,.{column.digits}f}")


def _gain(rows: pd.DataFrame) -> str:
    values = rows["gain"].dropna().astype(float)
    if values.empty:
        return _cell(None, ABSENT)
    mean = float(values.mean())
    return _cell(mean, f"{signed(mean)}{plus_minus(standard_error(values))}")


def _cell(value: float | None, text: str) -> str:
    return f'<td data-value="{"" if value is None else repr(value)}">{escape(text)}</td>'


def _first(text: str) -> float | None:
    """Return the number that a cell begins with, such as that of a verdict, to sort by it."""
    return None if text == ABSENT else float(text.split()[0].rstrip(",").replace("−", "-"))


def _about(runs: Sequence[Run]) -> dict[str, str]:
    """Return machines, versions and days of the runs."""
    reports = [run.report for run in runs if run.status == FINISHED]
    environments = [report.get("environment", {}) for report in reports]
    days = sorted(str(e.get("time", ""))[:10] for e in environments)
    found = {
        "machine": ", ".join(
            dict.fromkeys(f"{e.get('device')}, {e.get('cores')} cores" for e in environments)
        ),
        "software": ", ".join(
            dict.fromkeys(
                f"fusion {report.get('fusion')}, torch {e.get('torch')}"
                for report, e in zip(reports, environments, strict=True)
            )
        ),
        "run": " to ".join(dict.fromkeys((days[0], days[-1]))),
    }
    return {name: text for name, text in found.items() if text}
