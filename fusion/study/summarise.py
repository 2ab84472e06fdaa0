"""From the runs of a sweep to its table, its figures and its page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.figures.style import save_figure
from fusion.files import write_text
from fusion.run_folder import COMMAND
from fusion.study.drawing import drawings
from fusion.study.markdown import markdown_table
from fusion.study.page import page
from fusion.study.runs import FAILED, FINISHED, UNFINISHED, Run, read_runs, troubles
from fusion.study.table import run_table, strategy_table

TABLE, PAGE, MARKDOWN = "study.csv", "index.html", "study.md"
FIGURES = "figures"


@dataclass(frozen=True)
class Summary:
    """What a sweep came to.

    Attributes:
        text: for the terminal: how many runs, the table, what failed, where the files are.
        files: what was written.
        failed: names of the runs that failed.
        unfinished: names of the runs that were cut off.
    """

    text: str
    files: tuple[Path, ...]
    failed: tuple[str, ...]
    unfinished: tuple[str, ...]


def summarise(folder: str | Path) -> Summary:
    """Write ``study.csv``, ``study.md``, the figures and ``index.html`` into a sweep's folder.

    Everything comes from the reports of the runs below it; so it can be done at any time, while
    the sweep still runs or long after.

    Raises:
        UserError: there is no run in the folder.
    """
    folder = Path(folder)
    runs = read_runs(folder)
    table = run_table(runs)
    files = [folder / TABLE]
    write_text(folder / TABLE, table.to_csv(index=False))
    failed = tuple(run.name for run in runs if run.status == FAILED)
    unfinished = tuple(run.name for run in runs if run.status == UNFINISHED)
    finished = sum(run.status == FINISHED for run in runs)
    text = [f"{finished} of {len(runs)} runs finished"]
    if finished:
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
    text += [f"missing: {trouble}" for trouble in troubles(runs)]
    outside = [file.name for file in files if file.parent == folder]
    figures = any(file.parent != folder for file in files)
    drawn_in = f" and the figures in {FIGURES}/" if figures else ""
    text.append(f"Saved in {folder}: {', '.join(outside)}{drawn_in}")
    return Summary("\n".join(text) + "\n", tuple(files), failed, unfinished)


def _command(folder: Path, runs: Sequence[Run]) -> str:
    """Return the command of the sweep, or those of its runs where nobody kept it."""
    if (folder / COMMAND).is_file():
        return (folder / COMMAND).read_text(encoding="utf-8").strip()
    commands = [
        shlex.join(["fusion_bench", *run.report.get("choices", {}).get("overrides", [])])
        for run in runs
        if run.status == FINISHED
    ]
    return "\n".join(commands)
