"""The benchmark's questions, answered in sentences that are computed and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from fusion.study.benchmark.comparison import (
    BASE,
    SIMPLE_AVERAGE,
    against_simple_average,
    against_task_arithmetic,
    at_its_best,
    compare,
    control,
    one_per_seed,
    shared_block,
    simple_average,
    task_arithmetic,
    under,
)
from fusion.study.benchmark.statistics import (
    BETTER,
    EQUIVALENT,
    LEVEL,
    MARGIN,
    UNDECIDED,
    VERDICTS,
    WORSE,
    mean_ranks,
    standard_error,
)
from fusion.study.benchmark.table import (
    DEFAULTS,
    JOINT,
    MERGED_STATISTICS,
    ORACLE,
    PER_TASK,
    RECALIBRATE,
    Measured,
)
from fusion.study.benchmark.words import (
    count,
    mean_and_error,
    p_value,
    percent,
    plus_minus,
    signed,
)

NOT_MEASURED = "Not measured."
KERNELS, NORMALISED = "kernel ", "rows normalised"  # what their tracks begin with
SPECTRAL = ("task_singular_vectors", "iso_c")
ZIPPED, PERMUTED = "zipit", "git_rebasin"
_OWN, _PER_TASK, _RANKED, _RANDOM = "own ", "average per task", "ranked by ", "ranked by random"
_JOINT_TRAINING, _ENSEMBLE = "joint training", "ensemble"
_SMALL_GAP = 1.0  # points: of a smaller gap no share is computed


@dataclass(frozen=True)
class Answer:
    """What the runs say to one question.

    Attributes:
        name: short, as ``H1``.
        question: in words.
        sentences: the answer; of what no run measured, that it is not measured.
    """

    name: str
    question: str
    sentences: tuple[str, ...]


def answers(measured: Measured) -> list[Answer]:
    """Return the answer to every question of the benchmark."""
    asked: list[tuple[str, str, Callable[[Measured], Iterator[str]]]] = [
        (
            "H1",
            "With batch norm recalibrated and options chosen, which methods are equivalent to "
            f"chosen task arithmetic (± {MARGIN} points), which better, which worse?",
            _against_task_arithmetic,
        ),
        (
            "Average",
            "The same against the simple average, the method that needs nothing.",
            _against_simple_average,
        ),
        (
            "H2",
            "Does the way a kernel is made a matrix change TSV-M and Iso-C?",
            lambda found: _variants(found, KERNELS, SPECTRAL),
        ),
        (
            "H3",
            "Does normalising the rows first change a method?",
            lambda found: _variants(found, NORMALISED, ()),
        ),
        (
            "H4",
            "How much of the gap between the merge and joint training does a head fitted on all "
            "labels close?",
            _of_the_head,
        ),
        ("H5", "Of networks trained apart: is zipping better than permuting?", _zipped),
        ("H6", "Which kind of tensor costs most when it is shared?", _own_tensors),
        ("H7", "Does any ranking of layers beat a random selection?", _rankings),
        ("BN", "What do the treatments of batch norm gain?", _batch_norm),
        ("Ranks", "Which methods rank differently over the settings?", _ranks),
    ]
    return [
        Answer(name, question, tuple(say(measured)) or (NOT_MEASURED,))
        for name, question, say in asked
    ]


def _against_task_arithmetic(measured: Measured) -> Iterator[str]:
    table, reference = against_task_arithmetic(measured), task_arithmetic(measured)
    yield from _against(table, reference, "chosen task arithmetic")


def _against_simple_average(measured: Measured) -> Iterator[str]:
    table, reference = against_simple_average(measured), simple_average(measured)
    yield from _against(table, reference, "the simple average")


def _against(table: pd.DataFrame, reference: pd.DataFrame, name: str) -> Iterator[str]:
    if table["setting"].nunique() > 1:
        yield _tally(table, name)
    for setting, rows in table.groupby("setting", sort=False):
        levels = one_per_seed(reference[reference["setting"] == setting])
        yield f"{setting} ({name}: {_level(levels)}): {_by_verdict(rows)}.{_test_images(rows)}"


def _tally(table: pd.DataFrame, name: str) -> str:
    """Return in how many settings each is better, equivalent, worse and undecided, and its mean."""
    counts = table.groupby(["name", "verdict"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(VERDICTS), fill_value=0)
    counts = counts.sort_values([BETTER, EQUIVALENT, WORSE], ascending=[False, False, True])
    means = table.groupby("name")["mean"].mean()
    told = [
        f"{method} {' / '.join(str(n) for n in row)} ({signed(means[method])})"
        for method, *row in counts.itertuples()
    ]
    settings = table["setting"].nunique()
    return (
        f"Over {settings} settings, against {name}, {' / '.join(VERDICTS)} (mean difference over "
        f"the settings where it was measured): {', '.join(told)}."
    )


def _variants(measured: Measured, prefix: str, methods: Sequence[str]) -> Iterator[str]:
    rows = measured.methods
    variants = rows[rows["track"].astype(str).str.startswith(prefix)]
    usual = at_its_best(measured)  # as a variant: its option chosen where the method has one
    tables = {
        str(method): compare(group, usual[usual["method"] == method], name="track")
        for method, group in variants.groupby("method", sort=False)
    }
    for method, table in tables.items():
        if table["setting"].nunique() > 1:
            yield _tally(table, f"the usual form of {method}")
    for method, table in tables.items():
        for setting, found in table.groupby("setting", sort=False):
            yield f"{method} on {setting}, against its usual form: {_by_verdict(found)}."


def _of_the_head(measured: Measured) -> Iterator[str]:
    heads = measured.methods[measured.methods["track"] == ORACLE]
    merges = under(measured.methods, RECALIBRATE, DEFAULTS)
    questions = (
        ("score", control(measured, _JOINT_TRAINING), "joint training", 1.0),
        (JOINT, control(measured, _ENSEMBLE), "the ensemble, on the joint question", 100.0),
    )
    keys = ["setting", "method", "seed"]
    for column, ceilings, name, scale in questions:
        top: pd.Series[float] = scale * one_per_seed(ceilings, column)
        levels = pd.DataFrame(
            {
                "low": scale * merges.groupby(keys, sort=False)[column].mean(),
                "high": scale * heads.groupby(keys, sort=False)[column].mean(),
            }
        )
        table = levels.join(top.to_frame("top"), on=["setting", "seed"]).dropna()
        means = table.groupby(["setting", "method"], sort=False).mean()
        gap = means["top"] - means["low"]
        means["share"] = ((means["high"] - means["low"]) / gap).where(gap >= _SMALL_GAP)
        for setting, rows in means.groupby("setting", sort=False):
            yield _head_sentence(str(setting), name, rows.droplevel("setting"))


def _head_sentence(setting: str, name: str, means: pd.DataFrame) -> str:
    """Return the sentence on one setting.

    Args:
        setting: its name.
        name: of what the head comes closer to.
        means: per method ``low``, ``high``, ``top`` and the ``share`` of the gap, if there is one.
    """
    shares = means["share"].dropna().sort_values()
    if shares.empty:
        return f"{setting}, towards {name}: no merge is {_SMALL_GAP:g} point below it, no gap."
    first = SIMPLE_AVERAGE if SIMPLE_AVERAGE in shares.index else str(shares.index[0])
    low, high, top = (float(means[column][first]) for column in ("low", "high", "top"))
    text = (
        f"{setting}, towards {name} ({top:.1f}): {first} goes from {low:.1f} to {high:.1f}, "
        f"{percent(shares[first])} of the gap"
    )
    if len(shares) > 1:
        text += (
            f"; over {len(shares)} methods {percent(shares.iloc[0])} ({shares.index[0]}) to "
            f"{percent(shares.iloc[-1])} ({shares.index[-1]})"
        )
    return f"{text}."


def _zipped(measured: Measured) -> Iterator[str]:
    best = at_its_best(measured)
    best = best[~best["setting"].isin(control(measured, BASE)["setting"])]
    zipped, permuted = (best[best["method"] == name] for name in (ZIPPED, PERMUTED))
    table = compare(zipped, permuted, tasks=measured.tasks, one_family=True)
    for _, row in table.iterrows():
        yield (
            f"{row['setting']}: {ZIPPED} against {PERMUTED} {_difference(row)}, {row['verdict']}."
            f"{_test_images(table[table['setting'] == row['setting']])}"
        )


def _own_tensors(measured: Measured) -> Iterator[str]:
    own = control(measured, _OWN)
    average = control(measured, _PER_TASK)
    table = compare(own, average, name="track")
    levels = one_per_seed(average).groupby("setting").mean()
    table = table.assign(
        gap=100 - table["setting"].map(levels), kind=table["name"].str.removeprefix(_OWN)
    )
    shares = (table["mean"] / table["gap"]).where(table["gap"] >= _SMALL_GAP)
    means = shares.groupby(table["kind"]).mean().dropna().sort_values(ascending=False)
    if table["setting"].nunique() > 1:
        told = ", ".join(f"{kind} {percent(share)}" for kind, share in means.items())
        yield f"Of the gap, in the mean of {table['setting'].nunique()} settings: {told}."
    for setting, rows in table.groupby("setting", sort=False):
        level = one_per_seed(average[average["setting"] == setting])
        gap = float(rows["gap"].iloc[0])
        if gap < _SMALL_GAP:
            yield f"{setting}: the average per task is within {_SMALL_GAP:g} point of the experts."
            continue
        rows = rows.sort_values("mean", ascending=False)
        kinds = [
            f"{row['kind']} {percent(row['mean'] / gap)} "
            f"({_difference(row)}{'' if row['p_holm'] < LEVEL else ', not shown to differ from 0'})"
            for _, row in rows.iterrows()
        ]
        yield (
            f"{setting}: from the average per task ({_level(level)}) to the experts it is "
            f"{gap:.1f} points; tensors of one kind kept per task close {'; '.join(kinds)}."
        )


def _rankings(measured: Measured) -> Iterator[str]:
    ranked = control(measured, _RANKED)
    chance = ranked["track"].str.startswith(_RANDOM)
    table = compare(ranked[~chance], ranked[chance], name="track", one_family=True)
    if table.empty:
        return
    names = table["name"].str.removeprefix(_RANKED)
    table = table.assign(name=names.str.cat(table["setting"], sep=" on "))
    tests = f"{len(table)} {'comparison' if len(table) == 1 else 'comparisons'}"
    for kind, words in ((BETTER, "better than"), (WORSE, "worse than")):
        rows = table[table["verdict"] == kind].sort_values("mean", ascending=kind == WORSE)
        told = "; ".join(f"{row['name']} ({_difference(row)})" for _, row in rows.iterrows())
        yield f"Of {tests}, {len(rows)} {words} random draws{f': {told}' if told else ''}."
    rest = table[table["verdict"].isin((EQUIVALENT, UNDECIDED))]
    if len(rest):
        yield _by_verdict(rest).capitalize() + "."


def _batch_norm(measured: Measured) -> Iterator[str]:
    steps = (
        (RECALIBRATE, MERGED_STATISTICS, "recalibration gains over merged statistics"),
        (PER_TASK, RECALIBRATE, "a set per task gains over one recalibrated set"),
    )
    found: dict[str, dict[str, pd.DataFrame]] = {words: {} for *_, words in steps}
    for setting in measured.settings:
        here = measured.methods[measured.methods["setting"] == setting]
        for treatment, reference, words in steps:
            first, second = (
                under(here, t, DEFAULTS).set_index(["method", "seed"])["score"].astype(float)
                for t in (treatment, reference)
            )
            # Of methods measured on all seeds: a mean over other methods is another number.
            gains = (first - second).dropna().unstack("seed").dropna()
            if not gains.empty:
                found[words][setting] = gains
    for words, settings in found.items():
        if len(settings) > 1:
            means = pd.Series({name: gains.mean(axis=None) for name, gains in settings.items()})
            yield (
                f"Over {len(means)} settings, {words} {signed(means.mean())} points, from "
                f"{signed(means.min())} ({means.idxmin()}) to {signed(means.max())} "
                f"({means.idxmax()})."
            )
    for words, settings in found.items():
        for setting, gains in settings.items():
            seeds, methods = gains.mean(axis=0), gains.mean(axis=1)
            gain = f"{signed(seeds.mean())}{plus_minus(standard_error(seeds))}"
            yield (
                f"{setting}: {words} {gain} points in the mean of "
                f"{count(len(methods), 'method')}, from {signed(methods.min())} "
                f"({methods.idxmin()}) to {signed(methods.max())} ({methods.idxmax()})."
            )


def _ranks(measured: Measured) -> Iterator[str]:
    block = shared_block(at_its_best(measured))
    if len(block) < 2 or block.shape[1] < 2:
        return
    ranks = mean_ranks(block)
    told = ", ".join(f"{name} {rank:.1f}" for name, rank in ranks.mean.items())
    yield (
        f"Mean ranks over {ranks.settings} settings, options chosen and batch norm recalibrated: "
        f"{told}."
    )
    yield (
        f"Friedman's test: p = {p_value(ranks.p_friedman)}; ranks that differ by less than "
        f"{ranks.critical_difference:.2f} are not shown to differ (Nemenyi, {LEVEL:g})."
    )


def _by_verdict(rows: pd.DataFrame) -> str:
    """Return all compared, each under its verdict, the largest differences first."""
    parts = []
    for kind in (EQUIVALENT, BETTER, WORSE, UNDECIDED):
        found = rows[rows["verdict"] == kind]
        found = found.reindex(found["mean"].abs().sort_values(ascending=False).index)
        if len(found):
            told = ", ".join(f"{row['name']} ({_difference(row)})" for _, row in found.iterrows())
            parts.append(f"{kind}: {told}")
    return "; ".join(parts)


def _difference(row: pd.Series[float]) -> str:
    text = f"{signed(row['mean'])}{plus_minus(row['error'])}"
    if row["pairs"] < 2:
        return f"{text}, one seed"
    return text


def _test_images(rows: pd.DataFrame) -> str:
    """Return by how much other test images would move the differences of these rows."""
    least, largest = rows["test_least"].median(), rows["test_largest"].median()
    if math.isnan(least):
        return ""
    return (
        f" Other test images would move such a difference by {least:.1f} to {largest:.1f} points "
        f"(standard error), which more seeds do not lessen."
    )


def _level(values: pd.Series[float]) -> str:
    return f"{mean_and_error(values)}, {count(len(values), 'seed')}"
