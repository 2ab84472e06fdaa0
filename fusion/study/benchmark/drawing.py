"""Which figures the benchmark has, each with what it is called and what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from fusion.figures.benchmark_heatmap import benchmark_heatmap
from fusion.figures.benchmark_price import scores_against_data, scores_against_multiply_adds
from fusion.figures.benchmark_scores import benchmark_scores
from fusion.figures.critical_difference import critical_difference_diagram
from fusion.study.benchmark.comparison import (
    at_its_best,
    compare,
    control,
    groups,
    one_per_seed,
    shared_block,
    simple_average,
    under,
)
from fusion.study.benchmark.markdown import ordered
from fusion.study.benchmark.statistics import LEVEL, mean_ranks, standard_error
from fusion.study.benchmark.table import (
    CHOSEN,
    DATA,
    DEFAULTS,
    EXPERT,
    MERGED_STATISTICS,
    ORACLE,
    PER_TASK,
    RECALIBRATE,
    Measured,
)
from fusion.study.drawing import Drawing

SCORES = "benchmark_scores_"  # a figure per setting begins so
_BEST = "options chosen where a method has any, batch norm recalibrated"
_TREATMENTS = {
    MERGED_STATISTICS: ", batch norm merged",
    RECALIBRATE: "",
    PER_TASK: ", batch norm per task",
}


def drawings(measured: Measured) -> Iterator[Drawing]:
    """Yield every figure for which the runs have the numbers."""
    for drawing in _drawings(measured):
        # Laid out once for the three files that each becomes: most of the time goes there.
        drawing.figure.draw_without_rendering()
        drawing.figure.set_layout_engine("none")
        yield drawing


def _drawings(measured: Measured) -> Iterator[Drawing]:
    best = at_its_best(measured)
    best = best[best["score"].notna()]
    if best.empty:
        return
    yield from _heatmap(measured, best)
    yield from _ranks(measured, best)
    yield from _prices(measured, best)
    for setting in measured.settings:
        rows = best[best["setting"] == setting]
        if len(rows):
            yield _scores(measured, rows, setting)


def _heatmap(measured: Measured, best: pd.DataFrame) -> Iterator[Drawing]:
    table = compare(best[best["method"] != "simple_average"], simple_average(measured))
    if table.empty:
        return
    gains = table.pivot_table(index="name", columns="setting", values="mean", sort=False)
    names = [name for name in ordered(best) if name in gains.index]
    settings = [setting for setting in measured.settings if setting in gains.columns]
    figure = benchmark_heatmap(
        gains.loc[names, settings],
        groups(measured),
        label="difference from the simple average",
        absent="not measured or not applicable",
    )
    caption = (
        f"Score of each method in each setting minus that of the simple average of the same seeds; "
        f"{_BEST}."
    )
    yield Drawing("benchmark_heatmap", "What each method gains", caption, figure)


def _ranks(measured: Measured, best: pd.DataFrame) -> Iterator[Drawing]:
    block = shared_block(best)
    if len(block) < 2 or block.shape[1] < 2:
        return
    ranks = mean_ranks(block)
    figure = critical_difference_diagram(
        ranks.mean, ranks.critical_difference, ranks.cliques(), groups(measured)
    )
    left_out = sorted({*best["method"]} - {*block.columns})
    caption = (
        f"Mean ranks over {ranks.settings} settings; {_BEST}. A bar joins methods whose ranks are "
        f"not shown to differ (Nemenyi's test at {LEVEL:g})."
    )
    if left_out:
        caption += f" Not measured in all of these settings: {', '.join(left_out)}."
    yield Drawing("benchmark_ranks", "Mean ranks", caption, figure)


def _prices(measured: Measured, best: pd.DataFrame) -> Iterator[Drawing]:
    rows = measured.methods
    # Networks without running statistics have no treatment of them: no mean over all settings.
    treated = rows.loc[rows["batch_norm"].isin(_TREATMENTS), "setting"]
    with_batch_norm = best[best["setting"].isin(treated)]
    block = shared_block(best if with_batch_norm.empty else with_batch_norm)
    rows = rows[rows["setting"].isin(block.index) & rows["method"].isin(block.columns)]
    rows = rows[rows["track"].isin((DEFAULTS, CHOSEN, ORACLE))]
    plain = under(measured.methods, RECALIBRATE, DEFAULTS)
    one: pd.Series[float] = plain.groupby("setting")["multiply_adds"].min()
    rows = rows.assign(multiply_adds=rows["multiply_adds"] / rows["setting"].map(one.to_dict()))
    rows = rows.assign(
        name=rows["method"],
        condition=[
            f"{track}{_TREATMENTS.get(str(treatment), '')}"
            for track, treatment in zip(rows["track"], rows["batch_norm"], strict=True)
        ],
    )
    rows = rows.sort_values(["track", "batch_norm"], kind="stable", key=_in_order)
    over = f"in the mean of {len(block)} settings" if len(block) > 1 else f"on {block.index[0]}"
    if len(with_batch_norm) and len(block) > 1:
        over += " with batch norm"
    table = _over_settings(rows, ["name", "group", "condition", "data"], len(block))
    priced = table[(table["condition"] != ORACLE) & table["multiply_adds"].notna()]
    if len(priced):
        caption = (
            f"Scores {over} against what an answer to all tasks costs. A set of running statistics "
            "per task runs the network once per task."
        )
        figure = scores_against_multiply_adds(priced, _priced_controls(measured, block, one))
        yield Drawing("benchmark_multiply_adds", "What an answer costs", caption, figure)
    caption = (
        f"Scores {over} against the data that was looked at: by the method, to recalibrate batch "
        "norm (images) and to choose options or fit a head (labels)."
    )
    yield Drawing("benchmark_data", "What data buys", caption, scores_against_data(table, DATA))


def _in_order(values: pd.Series[str]) -> pd.Series[int]:
    """Return the places of tracks and treatments in a legend: what takes least comes first."""
    order = [DEFAULTS, CHOSEN, ORACLE, *_TREATMENTS]
    return values.map({name: place for place, name in enumerate(order)}).fillna(len(order))


def _over_settings(rows: pd.DataFrame, keys: list[str], settings: int) -> pd.DataFrame:
    """Return the mean over seeds and then settings, of what was measured in all settings."""
    means = rows.groupby([*keys, "setting"], sort=False)[["score", "multiply_adds"]].mean()
    found = means.dropna(subset="score").groupby(keys, sort=False)
    table = found.mean()[found.size() == settings]
    return table.reset_index()


def _priced_controls(
    measured: Measured, block: pd.DataFrame, one: pd.Series[float]
) -> pd.DataFrame:
    """Return the experts, each asked its own task, and joint training."""
    experts = control(measured, EXPERT).groupby(["setting", "seed"])["multiply_adds"].sum()
    costs = experts.groupby("setting").mean() / one
    told = [{"name": "experts", "score": 100.0, "multiply_adds": costs.reindex(block.index).mean()}]
    joint = control(measured, "joint training").groupby("setting")
    scores = joint["score"].mean().reindex(block.index)
    costs = joint["multiply_adds"].mean() / one
    told.append(
        {
            "name": "joint training",
            "score": scores.mean() if scores.notna().all() else math.nan,
            "multiply_adds": costs.reindex(block.index).mean(),
        }
    )
    return pd.DataFrame(told).dropna()


def _scores(measured: Measured, rows: pd.DataFrame, setting: str) -> Drawing:
    plain = under(measured.methods, RECALIBRATE, DEFAULTS)
    defaults = plain[plain["setting"] == setting].groupby("method")["score"].mean().to_dict()
    chosen = set(rows.loc[rows["track"] != DEFAULTS, "method"])
    table = pd.DataFrame(
        [
            {
                "name": method,
                "group": group["group"].iloc[0],
                "score": group["score"].mean(),
                "error": standard_error(group["score"]),
                "defaults": defaults.get(method, math.nan) if method in chosen else math.nan,
            }
            for method, group in rows.groupby("method", sort=False)
        ]
    )
    lines = {"experts": 100.0}
    for name in ("joint training", "base"):
        level = one_per_seed(control(measured, name))
        known = level[level.index.get_level_values("setting") == setting]
        if len(known):
            lines[name] = float(known.mean())
    seeds = rows["seed"].nunique()
    caption = (
        f"Mean over {seeds} seed{'s' * (seeds > 1)} ± standard error; {_BEST}. Lines are controls."
    )
    return Drawing(
        f"{SCORES}{setting}", f"Scores: {setting}", caption, benchmark_scores(table, lines)
    )
