"""Short names of merges and fine-tunings, made from what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fusion.study.table import SEED, is_base

# Words for the strategies of fine-tuning, in the order in which more is trained.
FINETUNINGS = {
    "none": "not fine-tuned",
    "head": "head",
    "selective": "merged layers + head",
    "full": "everything",
}
_ALWAYS = ("method.interpolation", "method.top_p")
_WORDS = {"rank_by": "ranked by", "batch_norm": "batch norm", "weighting": "weights"}


def merge_names(table: pd.DataFrame) -> list[str]:
    """Return what each row merged: interpolation and share, and whatever departs from the usual.

    The usual is the commonest value of an option among the rows of the same method; the first of
    equally common ones. So a study names what it varies, and nothing else.
    """
    return [_merge_name(table, row) for _, row in table.iterrows()]


def finetuning_name(strategy: str) -> str:
    """Return what is trained, in words."""
    return FINETUNINGS.get(strategy, strategy)


def fixed_options(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, Any]:
    """Return those of ``columns`` that have one value in all rows that have any."""
    found = {}
    for column in columns:
        values = table[column].dropna().unique()
        if len(values) == 1:
            found[column] = values[0]
    return found


def _merge_name(table: pd.DataFrame, row: pd.Series[Any]) -> str:
    if bool(is_base(row.to_frame().T).iloc[0]):
        return "base, not merged"
    same = table[(table["method"] == row["method"]) & (table["algorithm"] == row["algorithm"])]
    parts = []
    interpolation, share = (row.get(column) for column in _ALWAYS)
    if pd.notna(interpolation):
        parts.append(f"{str(interpolation).upper()}")
    if pd.notna(share):
        parts.append(f"{100 * float(share):g} %")
    if not parts:
        parts.append(str(row["method"] or row["algorithm"]))
    elif len(set(table["algorithm"]) - set(table.loc[is_base(table), "algorithm"])) > 1:
        parts.insert(0, str(row["method"] or row["algorithm"]))
    departures = []
    for column in table.columns:
        group, _, option = column.partition(".")
        if group != "method" or column in _ALWAYS or option == SEED or pd.isna(row[column]):
            continue
        if row[column] != same[column].value_counts(sort=True).index[0]:
            departures.append(f"{_WORDS.get(option, option)} {row[column]}")
    return ", ".join([" ".join(parts), *departures])
