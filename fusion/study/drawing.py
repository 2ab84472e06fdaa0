"""Figures of a study, with their titles and captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from fusion.figures.study_bars import study_bars
from fusion.figures.study_pareto import study_pareto
from fusion.figures.study_share import study_share
from fusion.study.findings import baseline_row, control_accuracy, series
from fusion.study.markdown import MEBIBYTE
from fusion.study.naming import merge_names
from fusion.study.table import NO_MERGE, is_baseline


@dataclass(frozen=True)
class Drawing:
    """A figure of the study.

    Attributes:
        stem: of its files.
        title: a few words.
        caption: content of the figure and how to read it.
        figure: the figure.
    """

    stem: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _Bars:
    column: str
    title: str
    label: str
    scale: float
    digits: int
    note: str = ""


_NOISE = " Strategies that train the same tensors differ only by the noise of the machine."
_AMOUNTS = (
    _Bars("finetuned_accuracy", "Accuracy after fine-tuning", "accuracy (%)", 100, 1),
    _Bars("finetuned_f1", "F1 after fine-tuning", "weighted F1 (%)", 100, 1),
    _Bars("training_seconds", "Time of fine-tuning", "wall time (s)", 1, 2, _NOISE),
    _Bars("peak_bytes", "Memory of fine-tuning", "peak memory (MiB)", 1 / MEBIBYTE, 0),
)
_CHANGES = (
    _Bars("accuracy_change", "Change in accuracy", "change in accuracy (points)", 100, 1),
    _Bars("f1_change", "Change in F1", "change in weighted F1 (points)", 100, 1),
    _Bars("time_saving", "Time saved", "time saved (%)", 100, 0, _NOISE),
    _Bars("memory_saving", "Memory saved", "peak memory saved (%)", 100, 0),
)


def drawings(strategies: pd.DataFrame) -> Iterator[Drawing]:
    """Yield every figure for which the table has the numbers.

    Args:
        strategies: of :func:`fusion.study.table.strategy_table`.
    """
    for drawing in _drawings(strategies):
        # Laid out once for its three files, because the layout takes most of the time.
        drawing.figure.draw_without_rendering()
        drawing.figure.set_layout_engine("none")
        yield drawing


def _drawings(strategies: pd.DataFrame) -> Iterator[Drawing]:
    table = strategies.assign(name=merge_names(strategies))
    table["interpolation"] = table.get("method.interpolation")
    table["share"] = table.get("method.top_p")
    baseline = baseline_row(strategies)
    merges = table[(table["algorithm"] != NO_MERGE) & table["merged_accuracy"].notna()]
    if merges["share"].nunique() > 1:
        figure = study_share(
            _from_nothing(merges.assign(series=series(strategies).loc[merges.index])),
            control=control_accuracy(strategies),
            baseline=None if baseline is None else float(baseline["finetuned_accuracy"]),
        )
        caption = (
            "Accuracy against the share of layers that is merged. Filled points on a line differ "
            "in their share alone; hollow ones also in other options."
        )
        yield Drawing("study_share", "Number of merged layers", caption, figure)
    if table[["training_seconds", "finetuned_accuracy"]].notna().all(axis=1).any():
        caption = (
            "Training time and accuracy of every fine-tuned model. Nothing lies above and to the "
            "left of the Pareto front, whose models are named."
        )
        yield Drawing("study_pareto", "Accuracy by training time", caption, study_pareto(table))
    for bars in _AMOUNTS:
        if table[bars.column].notna().any():
            line = None if baseline is None else float(baseline[bars.column])
            caption = f"One bar for each merge and each fine-tuning.{bars.note}"
            yield Drawing(f"study_{bars.column}", bars.title, caption, _bars(table, bars, line))
    if baseline is not None:
        others = table[~is_baseline(table)]
        for bars in _CHANGES:
            if others[bars.column].notna().any():
                caption = f"Against the base with everything trained, which is at 0.{bars.note}"
                figure = _bars(others, bars, None)
                yield Drawing(f"study_{bars.column}", bars.title, caption, figure)


def _from_nothing(merges: pd.DataFrame) -> pd.DataFrame:
    """Start every line where nothing is merged, where all interpolations are equal."""
    nothing = merges[(merges["share"] == 0) & (merges["series"] == "usual")]
    others = merges.loc[merges["series"] == "usual", "interpolation"].unique()
    copies = [
        nothing.assign(interpolation=name)
        for name in others
        if name not in set(nothing["interpolation"])
    ]
    if (merges["series"] == "random").any():
        copies.append(nothing.assign(series="random"))
    return pd.concat([merges, *copies], ignore_index=True)


def _bars(table: pd.DataFrame, bars: _Bars, baseline: float | None) -> Figure:
    return study_bars(
        table,
        bars.column,
        label=bars.label,
        scale=bars.scale,
        digits=bars.digits,
        baseline=baseline,
    )
