"""Summarise the runs of a sweep in a table, figures and a page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.figures.style import save_figure
from fusion.files import write_text
from fusion.run_folder import COMMAND
from fusion.study.benchmark.report import report as benchmark_report
from fusion.study.benchmark.table import is_benchmark
from fusion.study.drawing import drawings
from fusion.study.markdown import markdown_table
from fusion.study.page import page
from fusion.study.runs import (
    FAILED,
    FINISHED,
    NOT_APPLICABLE,
    UNFINISHED,
    Run,
    not_applicable,
    read_runs,
    troubles,
)
from fusion.study.table import run_table, strategy_table

TABLE, PAGE, MARKDOWN = "study.csv", "index.html", "study.md"
FIGURES = "figures"


@dataclass(frozen=True)
class Summary:
    """Summary of a sweep.

    Attributes:
        text: for the terminal: number of runs, table, failures, location of the files.
        files: the written files.
        failed: names of the runs that failed.
        unfinished: names of the interrupted runs.
    """

    text: str
    files: tuple[Path, ...]
    failed: tuple[str, ...]
    unfinished: tuple[str, ...]


def summarise(folder: str | Path) -> Summary:
    """Write ``study.csv``, ``study.md``, the figures and ``index.html`` into a sweep's folder.

    A sweep with runs of the benchmark has ``benchmark.csv`` and ``benchmark.md`` instead, with
    different figures and a different page.

    Everything is read from the reports of the runs below it, so that it can be done at any time,
    while the sweep still runs or long after.

    Raises:
        UserError: there is no run in the folder.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    if is_benchmark(runs):
        told, files = benchmark_report(folder, runs, command=_command(folder, runs))
        text = [_counts(runs), told]
    else:
        text, files = _study(folder, runs)
    text += [f"not applicable: {reason}" for reason in not_applicable(runs)]
    text += [f"missing: {trouble}" for trouble in troubles(runs)]
    outside = [file.name for file in files if file.parent == folder]
    figures = any(file.parent != folder for file in files)
    drawn_in = f" and the figures in {FIGURES}/" if figures else ""
    text.append(f"Saved in {folder}: {', '.join(outside)}{drawn_in}")
    failed = tuple(run.name for run in runs if run.status == FAILED)
    unfinished = tuple(run.name for run in runs if run.status == UNFINISHED)
    return Summary("\n".join(text) + "\n", tuple(files), failed, unfinished)


def _study(folder: Path, runs: Sequence[Run]) -> tuple[list[str], list[Path]]:
    """Write the summary common to all sweeps; return its text and the files."""
    table = run_table(runs)
    files = [folder / TABLE]
    write_text(folder / TABLE, table.to_csv(index=False))
    text = [_counts(runs)]
    if any(run.status == FINISHED for run in runs):
        strategies = strategy_table(table)
        told = markdown_table(strategies)
        write_text(folder / MARKDOWN, told)
        files.append(folder / MARKDOWN)
        text.append(told)
        drawn = list(drawings(strategies))
        for drawing in drawn:
            files += save_figure(drawing.figure, folder / FIGURES, drawing.stem)
        told = page(runs, strategies, drawn, command=_command(folder, runs))
        write_text(folder / PAGE, told)
        files.append(folder / PAGE)
    return text, files


def _counts(runs: Sequence[Run]) -> str:
    count = Counter(run.status for run in runs)
    text = f"{count[FINISHED]} of {len(runs)} runs finished"
    return text + (f", {count[NOT_APPLICABLE]} not applicable" if count[NOT_APPLICABLE] else "")


def _command(folder: Path, runs: Sequence[Run]) -> str:
    """Return the command of the sweep, or those of its runs if it was not recorded."""
    if (folder / COMMAND).is_file():
        return (folder / COMMAND).read_text(encoding="utf-8").strip()
    commands = [
        shlex.join(["fusion_bench", *run.report.get("choices", {}).get("overrides", [])])
        for run in runs
        if run.status == FINISHED
    ]
    return "\n".join(commands)
