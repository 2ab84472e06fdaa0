"""The study as one self-contained HTML page, readable on a phone and on paper."""

from __future__ import annotations

import io
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from fusion.study.drawing import Drawing
from fusion.study.findings import findings
from fusion.study.markdown import Line, lines, shown_columns
from fusion.study.naming import fixed_options
from fusion.study.runs import (
    FAILED,
    FINISHED,
    NOT_APPLICABLE,
    UNFINISHED,
    Run,
    not_applicable,
    troubles,
)

TITLE = "Merged layers: number, choice, interpolation and savings"
QUESTION = (
    "At which share of layers, by which interpolation and ranked how is a merged model as good as "
    "a fine-tuned one, and what does it save?"
)


def page(
    runs: Sequence[Run],
    strategies: pd.DataFrame,
    drawings: Iterable[Drawing],
    *,
    command: str,
) -> str:
    """Return the page as HTML.

    Args:
        runs: all runs, failed ones included.
        strategies: of :func:`fusion.study.table.strategy_table`.
        drawings: the figures.
        command: the command that reproduces the study.
    """
    heads = ["merge", "trained", *(column.title for column in shown_columns(strategies)), "note"]
    return string.Template(part("page.html")).substitute(
        style=part("page.css"),
        script=part("sort.js"),
        title=escape(TITLE),
        question=escape(QUESTION),
        trouble=trouble_element(runs),
        findings="\n".join(f"<li>{escape(sentence)}</li>" for sentence in findings(strategies)),
        setting="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
            for name, value in _setting(runs, strategies).items()
        ),
        legend=escape(_legend(strategies)),
        heads="".join(head_element(title, words=i in (0, 1)) for i, title in enumerate(heads)),
        rows="\n".join(_row(line) for line in lines(strategies)),
        figures="\n".join(figure_element(drawing) for drawing in drawings),
        command=escape(command),
    )


def part(name: str) -> str:
    """Return the text of a template, style or script of this package."""
    return files("fusion.study").joinpath(name).read_text(encoding="utf-8").strip()


def trouble_element(runs: Sequence[Run]) -> str:
    """Return the runs that failed or were interrupted, so that the rest is not taken for complete.

    Methods that do not apply to a pool are listed separately.
    """
    told = ""
    missing = sum(run.status in (FAILED, UNFINISHED) for run in runs)
    if missing:
        text = f"Missing below, of {len(runs)} runs: {missing}."
        told += f'<div class="failed"><p>{text}</p><ul>{_items(troubles(runs))}</ul></div>'
    if reasons := not_applicable(runs):
        number = sum(run.status == NOT_APPLICABLE for run in runs)
        text = f"Not applicable, of {len(runs)} runs: {number}."
        told += f"<details><summary>{text}</summary><ul>{_items(reasons)}</ul></details>"
    return told


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{escape(text)}</li>" for text in texts)


def _setting(runs: Sequence[Run], strategies: pd.DataFrame) -> dict[str, str]:
    reports = [run.report for run in runs if run.status == FINISHED]
    first = reports[0]
    environment = first.get("environment", {})
    task: Mapping[str, Any] = first.get("evaluation", {}).get("merged", {})
    name = next(iter(task), "")
    images = task.get(name, {}).get("images")
    measured = name if images is None else f"{name}, {images:,} images"
    setting = {
        "model pool": _several(report.get("choices", {}).get("modelpool") for report in reports),
        "models": ", ".join(first.get("models", [])),
        "measured on": measured,
        "runs": f"{len(reports)} in {len(strategies)} combinations",
        "seeds": _several(report.get("seed") for report in reports),
        "fine-tuning": _options(fixed_options(strategies, "finetune")),
        "alignment": _alignment(strategies),
        "merging": _options(fixed_options(strategies, "method")),
        "machine": f"{environment.get('device', '?')}, {environment.get('cores', '?')} cores, "
        f"torch {environment.get('torch', '?')}",
        "software": f"fusion {first.get('fusion', '?')}",
        "finished": max(str(r.get("environment", {}).get("time", "")) for r in reports)[:10],
    }
    return {key: value for key, value in setting.items() if value}


def _alignment(strategies: pd.DataFrame) -> str:
    known = strategies["aligned"].dropna()
    if known.empty:
        return ""
    text = "changed the experts" if known.any() else "changed nothing"
    cycle = strategies["cycle_consistency"].max()
    return text if pd.isna(cycle) else f"{text}; forth and back differ by {cycle:.2g} (mean square)"


def _several(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
    )


def _legend(strategies: pd.DataFrame) -> str:
    text = "The baseline comes first, tinted; the best value of a column is bold."
    if strategies["memory"].eq("rss").any():
        text += " Peak memory is the process's resident memory above its level at the start."
    elif strategies["memory"].eq("device").any():
        text += " Peak memory is the device's, as torch allocated it."
    if strategies["consistency_all_layers"].notna().any():
        text += " Consistency is that with the experts over all layers (task vectors)."
    if strategies["seeds"].max() > 1:
        text += " Numbers are means over the seeds ± standard error."
    return text


def head_element(title: str, *, words: bool) -> str:
    """Return a heading of the table that sorts by its column."""
    kind = ' class="words"' if words or title == "note" else ""
    return f'<th scope="col"{kind}><button type="button">{escape(title)}</button></th>'


def word_cell(text: str) -> str:
    """Return a cell of words, which sorts by them."""
    return f'<td class="words" data-value="{escape(text)}">{escape(text)}</td>'


def _row(line: Line) -> str:
    cells = [word_cell(text) for text in (line.merge, line.finetuning)]
    for cell in line.cells:
        value = "" if cell.value is None else repr(cell.value)
        best = ' class="best"' if cell.best else ""
        cells.append(f'<td{best} data-value="{value}">{escape(cell.text)}</td>')
    cells.append(f'<td class="note" data-value="{escape(line.note)}">{escape(line.note)}</td>')
    kind = ' class="baseline"' if line.baseline else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"


def figure_element(drawing: Drawing) -> str:
    """Return a drawing with its caption as HTML."""
    title, caption = escape(drawing.title), escape(drawing.caption)
    return (
        f'<figure role="img" aria-label="{title}">{svg(drawing.figure, drawing.stem)}'
        f"<figcaption><b>{title}.</b> {caption}</figcaption></figure>"
    )


def svg(figure: Figure, salt: str) -> str:
    """Return a figure as an ``<svg>`` element; ids differ where ``salt`` does.

    Several figures share a page, and clip paths of one name would cut each other's lines.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
