"""Conditions of the benchmark held against a reference of the same setting and seed."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from fusion.study.benchmark.statistics import (
    MARGIN,
    VERDICTS,
    holm,
    paired_difference,
    score_error_bounds,
    verdict,
)
from fusion.study.benchmark.table import (
    AVERAGE,
    CHOSEN,
    DEFAULTS,
    RECALIBRATE,
    WITHOUT_STATISTICS,
    Measured,
)

TASK_ARITHMETIC, SIMPLE_AVERAGE = "task_arithmetic", "simple_average"
BASE = "base"  # the control of this name: only settings whose networks have a base have it
_MEASURED = ("accuracy", "expert", "images")
COLUMNS = (
    "setting", "name", "pairs", "mean", "error", "p", "p_holm", "p_equivalence",
    "p_equivalence_holm", "verdict", "test_least", "test_largest",
)  # fmt: skip


def under(rows: pd.DataFrame, treatment: str, track: str) -> pd.DataFrame:
    """Return the rows of a track under a treatment of batch norm.

    A network without running statistics has no treatment; it counts as recalibrated.
    """
    treatments = [treatment]
    if treatment == RECALIBRATE:
        treatments.append(WITHOUT_STATISTICS)
    return rows[rows["batch_norm"].isin(treatments) & (rows["track"] == track)]


def at_its_best(measured: Measured, treatment: str = RECALIBRATE) -> pd.DataFrame:
    """Return a row per setting, method and seed: options chosen, or defaults of what has none.

    A method that has chosen options in any run of a setting is left out of those seeds of the
    setting where they are missing: no comparison mixes both tracks.
    """
    chosen = under(measured.methods, treatment, CHOSEN)
    defaults = under(measured.methods, treatment, DEFAULTS)
    pairs = {*zip(chosen["setting"], chosen["method"], strict=True)}
    without = [
        pair not in pairs for pair in zip(defaults["setting"], defaults["method"], strict=True)
    ]
    return pd.concat([chosen, defaults[without]]).sort_index()


def simple_average(measured: Measured, treatment: str = RECALIBRATE) -> pd.DataFrame:
    """Return a row per setting and seed: the simple average.

    Where the method was not run, the control of the same name stands in for recalibrated ones.
    """
    rows = under(measured.methods, treatment, DEFAULTS)
    rows = rows[rows["method"] == SIMPLE_AVERAGE]
    if treatment != RECALIBRATE:
        return rows
    controls = measured.controls[measured.controls["track"] == AVERAGE]
    known = {*zip(rows["setting"], rows["seed"], strict=True)}
    missing = [
        pair not in known for pair in zip(controls["setting"], controls["seed"], strict=True)
    ]
    return pd.concat([rows, controls[missing]])


def control(measured: Measured, track: str) -> pd.DataFrame:
    """Return the rows of the controls' job whose track begins with ``track``."""
    return measured.controls[measured.controls["track"].astype(str).str.startswith(track)]


def one_per_seed(rows: pd.DataFrame, column: str = "score") -> pd.Series[float]:
    """Return (setting, seed) → the mean of a column, such as that of several random draws."""
    found: pd.Series[float] = rows.dropna(subset=column).groupby(["setting", "seed"])[column].mean()
    return found


def compare(
    rows: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    tasks: pd.DataFrame | None = None,
    name: str = "method",
    column: str = "score",
    margin: float = MARGIN,
    one_family: bool = False,
) -> pd.DataFrame:
    """Return a row per setting and name: the paired difference from the reference.

    Args:
        rows: conditions, at most one per setting, name and seed.
        reference: conditions; several of one seed count by their mean.
        tasks: accuracies per task, for the bounds of the test error (``test_least``,
            ``test_largest``, in points); missing without.
        name: the column that tells the compared conditions apart.
        column: what is compared.
        margin: of equivalence, in the unit of the column.
        one_family: whether Holm's correction is over all rows together and not within a setting.
    """
    levels = one_per_seed(reference, column)
    details = _Accuracies(tasks, reference) if tasks is not None else None
    found = []
    for (setting, which), group in rows.groupby(["setting", name], sort=False):
        values = group.set_index("seed")[column].astype(float)
        paired = levels[levels.index.get_level_values("setting") == setting].droplevel(0)
        seeds = [seed for seed in values.index if seed in paired.index]
        difference = paired_difference(
            values[seeds].tolist(), [paired[s] for s in seeds], margin=margin
        )
        least, largest = (
            (np.nan, np.nan) if details is None else details.bounds(group, str(setting))
        )
        found.append(
            {
                "setting": setting,
                "name": which,
                "pairs": difference.pairs,
                "mean": difference.mean,
                "error": difference.error,
                "p": difference.p,
                "p_equivalence": difference.p_equivalence,
                "test_least": least,
                "test_largest": largest,
            }
        )
    table = pd.DataFrame(found, columns=COLUMNS)
    table = table[table["pairs"] > 0].reset_index(drop=True)
    families = pd.Series("all", index=table.index) if one_family else table["setting"]
    for p in ("p", "p_equivalence"):
        corrected = table.groupby(families)[p].transform(lambda values: holm(values.tolist()))
        table[f"{p}_holm"] = corrected.astype(float)
    table["verdict"] = [
        verdict(row["mean"], row["p_holm"], row["p_equivalence_holm"], margin=margin)
        for _, row in table.iterrows()
    ]
    return table


class _Accuracies:
    """Mean accuracies per task of conditions and of the reference, for the test error."""

    def __init__(self, tasks: pd.DataFrame, reference: pd.DataFrame) -> None:
        self._tasks: dict[tuple[str, str], list[tuple[str, float, float, float]]] = {}
        columns = [tasks[name] for name in ("run", "condition", "task", *_MEASURED)]
        for run, condition, *row in zip(*columns, strict=True):
            self._tasks.setdefault((run, condition), []).append(tuple(row))
        self._reference = {
            str(setting): self._means(group)[0] for setting, group in reference.groupby("setting")
        }

    def bounds(self, group: pd.DataFrame, setting: str) -> tuple[float, float]:
        if setting not in self._reference:
            return np.nan, np.nan
        accuracy, expert, images = self._means(group)
        return score_error_bounds(accuracy, self._reference[setting], expert, images)

    def _means(self, group: pd.DataFrame) -> list[dict[str, float]]:
        """Return task → mean accuracy, its expert's, and number of images; of complete tasks."""
        found: dict[str, list[tuple[float, ...]]] = {}
        for key in zip(group["run"], group["condition"], strict=True):
            for task, *numbers in self._tasks.get(key, ()):
                found.setdefault(task, []).append(tuple(numbers))
        means = {task: np.mean(numbers, axis=0).tolist() for task, numbers in found.items()}
        means = {task: row for task, row in means.items() if not np.isnan(row).any()}
        return [{task: row[i] for task, row in means.items()} for i in range(len(_MEASURED))]


def task_arithmetic(measured: Measured) -> pd.DataFrame:
    """Return a row per setting and seed: task arithmetic, chosen and recalibrated."""
    rows = under(measured.methods, RECALIBRATE, CHOSEN)
    return rows[rows["method"] == TASK_ARITHMETIC]


def against_task_arithmetic(measured: Measured) -> pd.DataFrame:
    """Return how every method at its best differs from chosen task arithmetic."""
    best = at_its_best(measured)
    others = best[best["method"] != TASK_ARITHMETIC]
    return compare(others, task_arithmetic(measured), tasks=measured.tasks)


def against_simple_average(measured: Measured) -> pd.DataFrame:
    """Return how every method at its best differs from the simple average."""
    best = at_its_best(measured)
    others = best[best["method"] != SIMPLE_AVERAGE]
    return compare(others, simple_average(measured), tasks=measured.tasks)


def overview(measured: Measured) -> pd.DataFrame:
    """Return a row per method: what it gains over the simple average, at its best.

    Columns: ``score`` and ``gain`` are means over the settings whose networks have one base,
    ``gain_apart`` over those of networks trained apart (missing where the method was not measured),
    and the number of settings under each verdict. Means over different settings are no numbers to
    compare: a method that is missing in one setting of a kind has none for that kind.
    """
    based = {*control(measured, BASE)["setting"]}
    kinds = {"gain": based, "gain_apart": {*measured.settings} - based}
    best, table = at_its_best(measured), against_simple_average(measured)
    score = best.groupby(["method", "setting"], sort=False)["score"].mean()
    gain = table.set_index(["name", "setting"])["mean"]
    verdicts = table.groupby(["name", "verdict"]).size().unstack(fill_value=0)
    rows = {}
    for method in best["method"].unique():
        row = {"score": _mean_over(score, method, based)}
        for column, settings in kinds.items():
            row[column] = _mean_over(gain, method, settings) if method in verdicts.index else np.nan
        rows[method] = row
    found = pd.DataFrame.from_dict(rows, orient="index")
    return found.join(verdicts.reindex(columns=list(VERDICTS), fill_value=0))


def _mean_over(values: pd.Series[float], method: str, settings: Collection[str]) -> float:
    """Return the mean over settings; missing where one of them is."""
    found = values[values.index.get_level_values(0) == method].droplevel(0)
    if not settings or not {*settings} <= {*found.dropna().index}:
        return np.nan
    return float(found[sorted(settings)].mean())


def shared_block(rows: pd.DataFrame) -> pd.DataFrame:
    """Return settings × methods of mean scores without a gap: what ranks can be computed of.

    Settings in which less than half of the methods were measured are left out (networks trained
    apart are no case for most), then methods that are missing in one of the rest.
    """
    means = rows.dropna(subset="score").groupby(["setting", "method"], sort=False)["score"].mean()
    table = means.unstack()
    if table.empty:
        return table
    kept = table[table.notna().sum(axis=1) * 2 >= table.shape[1]]
    return kept.dropna(axis=1)


def groups(measured: Measured) -> dict[str, str]:
    """Return method → the most it needs."""
    rows = measured.methods.drop_duplicates("method")
    return dict(zip(rows["method"], rows["group"], strict=True))
