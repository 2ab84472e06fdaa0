"""From the runs of a benchmark to its table, its answers, its figures and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusion.figures.style import save_figure
from fusion.files import write_text
from fusion.study.benchmark.answers import answers
from fusion.study.benchmark.drawing import drawings
from fusion.study.benchmark.markdown import markdown
from fusion.study.benchmark.page import page
from fusion.study.benchmark.table import measured
from fusion.study.runs import Run

TABLE, MARKDOWN, PAGE = "benchmark.csv", "benchmark.md", "index.html"
FIGURES = "figures"


def report(folder: Path, runs: Sequence[Run], *, command: str) -> tuple[str, list[Path]]:
    """Write ``benchmark.csv``, ``benchmark.md``, the figures and ``index.html``.

    Args:
        folder: of the sweep.
        runs: all runs; at least one finished and is of the benchmark.
        command: what reproduces the sweep.

    Returns:
        What the terminal shows, and the files.
    """
    found = measured(runs)
    answered = answers(found)
    write_text(folder / TABLE, found.csv())
    write_text(folder / MARKDOWN, markdown(found, answered, command=command))
    drawn = list(drawings(found))
    files = [folder / TABLE, folder / MARKDOWN]
    for drawing in drawn:
        files += save_figure(drawing.figure, folder / FIGURES, drawing.stem)
    write_text(folder / PAGE, page(runs, found, answered, drawn, command=command))
    told = "\n".join(
        f"{answer.name}. {answer.question}\n" + "\n".join(f"  {s}" for s in answer.sentences)
        for answer in answered
    )
    return told, [*files, folder / PAGE]
