"""Short names of merges and fine-tunings, derived from their options."""

from __future__ import annotations

from numbers import Real
from typing import Any

import pandas as pd

from fusion.study.table import SEED, is_base

_ALWAYS = ("method.interpolation", "method.top_p")
_WORDS = {"rank_by": "ranked by", "batch_norm": "batch norm", "weighting": "weights"}
_PHRASES = {
    ("rank_by", "random"): "layers at random",
    ("weighting", "equal"): "equal weights",
    ("align", False): "not aligned",
}
_TREATED = {"recalibrate": "recalibrated", "merge": "merged", "pretrained": "kept"}


def merge_names(table: pd.DataFrame) -> list[str]:
    """Return a name for each row's merge: interpolation, share, and unusual options.

    Names contain only what a study varies; see :func:`departs`.
    """
    departing = departs(table)
    bases = is_base(table)
    methods = table.loc[~bases, ["algorithm", "method"]].drop_duplicates()
    names = []
    for place, (_, row) in enumerate(table.iterrows()):
        if bases.iloc[place]:
            treated = _TREATED.get(str(row["batch_norm"]))
            names.append(f"base, batch norm {treated}" if treated else "base, as it is")
            continue
        words = [
            _PHRASES.get((option, row[column]), f"{_WORDS.get(option, option)} {row[column]}")
            for column, option in ((c, c.partition(".")[2]) for c in departing.columns)
            if departing[column].iloc[place]
        ]
        names.append(", ".join([_merge_name(row, alone=len(methods) == 1), *words]))
    return names


def departs(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each row and option of the method, whether it is not the usual one.

    The usual is the commonest value among the rows of the same method, the first of equally
    common ones. Interpolation and share, by which merges are named, and seeds do not count.
    """
    columns = [
        column
        for column in table.columns
        if column.startswith("method.")
        and column not in _ALWAYS
        and column.partition(".")[2] != SEED
    ]
    found = pd.DataFrame(False, index=table.index, columns=columns)
    for _, rows in table.groupby(["algorithm", "method"], dropna=False, sort=False):
        for column in columns:
            values = rows[column].dropna()
            if len(values):
                usual = values.value_counts(sort=False).idxmax()
                found.loc[rows.index, column] = rows[column].notna() & (rows[column] != usual)
    return found


def fixed_options(table: pd.DataFrame, group: str) -> dict[str, Any]:
    """Return the options of ``group`` with one value in all rows that have any, seeds apart."""
    found = {}
    for column in table.columns:
        of, _, option = column.partition(".")
        values = table[column].dropna().unique()
        if of == group and option not in ("", SEED) and len(values) == 1:
            found[option] = values[0]
    return found


def _merge_name(row: pd.Series[Any], *, alone: bool) -> str:
    interpolation, share = (row.get(column) for column in _ALWAYS)
    parts = []
    if pd.notna(interpolation):
        parts.append(str(interpolation).upper())
    if pd.notna(share):
        # A foreign method may use that option with any meaning.
        parts.append(f"{100 * share:g} %" if isinstance(share, Real) else str(share))
    if not parts or not alone:
        method = row["method"] if pd.notna(row["method"]) else row["algorithm"]
        parts.insert(0, str(method))
    return " ".join(parts)
