"""Findings of a study: sentences computed from its numbers."""

from __future__ import annotations

import math

import pandas as pd

from fusion.figures.study_style import finetuning_style
from fusion.study.naming import departs, merge_names
from fusion.study.table import NO_FINETUNING, is_base, is_baseline

_STEADY = 1.5  # times of equal work that differ by a larger factor measure the machine
_EQUAL = 0.005  # a share that would be shown as 0 %


def baseline_row(strategies: pd.DataFrame) -> pd.Series[float] | None:
    """Return the base fine-tuned in full, or None if the study has no such run, or several."""
    rows = strategies[is_baseline(strategies)]
    return rows.iloc[0] if len(rows) == 1 else None


def control_accuracy(strategies: pd.DataFrame) -> float | None:
    """Return the accuracy of the unmerged base under the merges' batch-norm treatment.

    None if no run measured it, or runs with different treatments did.
    """
    rows = strategies[strategies["control_accuracy"].notna()]
    if rows.empty or rows["control"].nunique() > 1:
        return None
    return float(rows["control_accuracy"].mean())


def findings(strategies: pd.DataFrame) -> list[str]:
    """Return the study's findings, one or two sentences each."""
    table = strategies.assign(name=merge_names(strategies))
    merged = table[~is_base(table)]
    found = []
    baseline = baseline_row(strategies)
    if baseline is not None:
        found.append(
            f"The baseline, the base with everything trained, reaches "
            f"{_percent(baseline['finetuned_accuracy'])} in {baseline['training_seconds']:.1f} s."
        )
    if merged["merged_accuracy"].notna().any():
        best = merged.iloc[int(merged["merged_accuracy"].argmax())]
        sentence = (
            f"The best merge without any training is {best['name']}, at "
            f"{_percent(best['merged_accuracy'])}"
        )
        control = control_accuracy(strategies)
        if control is not None:
            sentence += f"; the base under the same batch norm has {_percent(control)}, unmerged"
        found.append(f"{sentence}.")
    for strategy, rows in merged.groupby("strategy", sort=False):
        if strategy != NO_FINETUNING and rows["finetuned_accuracy"].notna().any():
            found.append(_of_finetuning(str(strategy), rows, baseline is not None))
    return found + _against_chance(strategies) + _of_chance(table) + _of_the_clock(table)


def series(strategies: pd.DataFrame) -> pd.Series[str]:
    """Return the kind of each row: a usual merge, one of layers at random, or another.

    Usual are those that differ from each other in interpolation and share alone.
    """
    departing = departs(strategies)
    others = [column for column in departing.columns if column != "method.rank_by"]
    names = pd.Series("other", index=strategies.index)
    names = names.mask(~departing.any(axis=1), "usual")
    if "method.rank_by" not in strategies:
        return names
    random = (strategies["method.rank_by"] == "random") & ~departing[others].any(axis=1)
    return names.mask(random, "random")


def _of_chance(table: pd.DataFrame) -> list[str]:
    """Return the resolution of the test images for differences between two models."""
    accuracy, images = table["merged_accuracy"].max(), table["images"].max()
    if math.isnan(accuracy) or math.isnan(images):
        return []
    error = math.sqrt(accuracy * (1 - accuracy) / images)
    return [
        f"On {images:,.0f} test images an accuracy near {_percent(accuracy)} is known to "
        f"± {100 * error:.1f} points (standard error); smaller differences are not significant."
    ]


def _of_the_clock(table: pd.DataFrame) -> list[str]:
    """Return a warning if runs that trained all the same tensors took unequal times."""
    full = table.loc[table["trained_parameters"] == table["trained_parameters"].max()]
    seconds = full["training_seconds"].dropna()
    if len(seconds) < 2 or seconds.max() < _STEADY * seconds.min():
        return []
    return [
        f"Beware of the times: training everything took between {seconds.min():.1f} and "
        f"{seconds.max():.1f} s, for equal work. The machine had other things to do."
    ]


def _against_chance(strategies: pd.DataFrame) -> list[str]:
    """Return the gain of ranking the layers over drawing as many at random."""
    table = strategies.assign(series=series(strategies))[~is_base(strategies)]
    if not (table["series"] == "random").any():
        return []
    same = ["method.interpolation", "method.top_p", "strategy"]
    ranked = table[table["series"] == "usual"].merge(
        table[table["series"] == "random"], on=same, suffixes=("", "_random")
    )
    if ranked.empty:
        return []
    changes = []
    for column, when in (("merged_accuracy", "before"), ("finetuned_accuracy", "after")):
        difference = (ranked[column] - ranked[f"{column}_random"]).mean()
        if not math.isnan(difference):
            changes.append(f"{_points(difference)} {when} fine-tuning")
    by = ranked["method.rank_by"].iloc[0]
    return [
        f"Choosing layers by their rank ({by}) instead of as many at random is worth "
        f"{' and '.join(changes)}, in the mean of {len(ranked)} pairs."
    ]


def _of_finetuning(strategy: str, rows: pd.DataFrame, has_baseline: bool) -> str:
    best = rows.iloc[int(rows["finetuned_accuracy"].argmax())]
    sentence = (
        f"With {finetuning_style(strategy)[1]} trained, the best is {best['name']}, at "
        f"{_percent(best['finetuned_accuracy'])}"
    )
    if not has_baseline:
        return f"{sentence}."
    reached = int((rows["accuracy_change"] >= 0).sum())
    sentence += (
        f": {_points(best['accuracy_change'])} against the baseline, "
        f"{_saving(best['time_saving'], 'time')}"
    )
    if not math.isnan(float(best["memory_saving"])):
        sentence += f" and {_saving(best['memory_saving'], 'memory')}"
    return f"{sentence}. {reached} of {len(rows)} merges reach the baseline so."


def _saving(share: float, what: str) -> str:
    if abs(share) < _EQUAL:
        return f"as much {what}"
    return f"{100 * abs(share):.0f} % {'less' if share >= 0 else 'more'} {what}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
