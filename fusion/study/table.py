"""Tables of a study: one row per run, and one row per strategy over its seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fusion.study.runs import FINISHED, Run

SEED = "seed"
NO_MERGE = "DummyAlgorithm"  # the algorithm that returns the base
NO_FINETUNING = "none"

# Gains and savings of a run relative to the baseline of its own seed: differences of shares, and
# shares of the baseline's cost that were not needed (negative is more).
CHANGES = ("accuracy_change", "f1_change", "time_saving", "memory_saving")

# The figures of a run, in the order of the columns; accuracies and F1 are shares, 0 to 1.
FIGURES = (
    "merged_accuracy",
    "merged_f1",
    "finetuned_accuracy",
    "finetuned_f1",
    "training_seconds",
    "peak_bytes",
    "trained_parameters",
    "control_accuracy",
    "control_f1",
    "merged_layers",
    "candidate_layers",
    "consistency_all_layers",
    "consistency_merged_layers",
    "cycle_consistency",
    "run_seconds",
    "evaluate_seconds",
    "images",
    *CHANGES,
)
_CHOICES = ("algorithm", "method", "modelpool", "taskpool", "strategy", SEED)
_IDENTITY = ("run", "status", "error")
_NOTES = ("order", "same_as", "control", "memory", "batch_norm", "aligned")


def run_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row per run, including failed ones.

    Columns: ``run``, ``status``, ``error``; the choices (``algorithm``, ``method``, ``modelpool``,
    ``taskpool``, ``strategy`` of fine-tuning, ``seed``, and every option as
    ``method.<option>`` and ``finetune.<option>``); ``FIGURES`` on the first task; and every task's
    as ``<task>/merged/accuracy`` and so on. Values that a run does not have are missing.
    """
    rows = [_row(run, order) for order, run in enumerate(runs)]
    table = pd.DataFrame(rows)
    first = [*_IDENTITY, *_CHOICES]
    options = [c for c in table.columns if c.startswith(("method.", "finetune."))]
    figures = [*FIGURES, *_NOTES]
    rest = [c for c in table.columns if c not in {*first, *options, *figures}]
    return _against_baseline(table.reindex(columns=[*first, *options, *figures, *rest]))


def choice_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns of the choices, except seeds."""
    return [
        column
        for column in table.columns
        if (column in _CHOICES or column.startswith(("method.", "finetune.")))
        and column.rpartition(".")[2] != SEED
    ]


def strategy_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per combination of choices: mean over its seeds and standard error.

    Columns: the choices, ``seeds`` (their number), each of ``FIGURES`` (the mean) and
    ``<figure>_error`` (the standard error of the mean; missing for a single seed); ``order``,
    ``same_as``, ``control``, ``memory``, ``batch_norm`` and ``aligned`` of the first. Runs that did
    not finish are excluded.
    """
    finished = runs[runs["status"] == FINISHED]
    choices = choice_columns(finished)
    rows = []
    for _, group in finished.groupby(choices, dropna=False, sort=False):
        first = group.iloc[0]
        row = {column: first[column] for column in (*choices, *_NOTES)}
        row["seeds"] = len(group)
        for figure in FIGURES:
            values = group[figure].dropna().astype(float)
            row[figure] = values.mean() if len(values) else math.nan
            row[f"{figure}_error"] = (
                values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            )
        rows.append(row)
    return pd.DataFrame(rows).sort_values("order").reset_index(drop=True)


def is_base(table: pd.DataFrame) -> pd.Series[bool]:
    """Return a mask of the rows that merged nothing: the base, also with its batch norm treated."""
    return (table["algorithm"] == NO_MERGE) | (table["merged_layers"] == 0)


def is_baseline(table: pd.DataFrame) -> pd.Series[bool]:
    """Return a mask of the baseline rows: the base, fine-tuned in full."""
    return (table["algorithm"] == NO_MERGE) & (table["strategy"] == "full")


def _against_baseline(table: pd.DataFrame) -> pd.DataFrame:
    """Fill in ``CHANGES``, missing where a seed has no baseline or more than one."""
    baselines = table[is_baseline(table)].drop_duplicates(SEED, keep=False).set_index(SEED)

    def baseline(figure: str) -> pd.Series[float]:
        return table[SEED].map(baselines[figure].astype(float))

    changes = {
        "accuracy_change": table["finetuned_accuracy"] - baseline("finetuned_accuracy"),
        "f1_change": table["finetuned_f1"] - baseline("finetuned_f1"),
        "time_saving": 1 - table["training_seconds"] / baseline("training_seconds"),
        "memory_saving": 1 - table["peak_bytes"] / baseline("peak_bytes"),
    }
    return table.assign(**changes)


def _row(run: Run, order: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": run.name,
        "status": run.status,
        "error": run.error,
        "order": order,
    }
    if run.status != FINISHED:
        return row
    report = run.report
    choices = report.get("choices", {})
    finetune = report.get("finetune") or {}
    algorithm = report.get("algorithm", {})
    row |= {
        "algorithm": report.get("method"),
        "method": choices.get("method"),
        "modelpool": choices.get("modelpool"),
        "taskpool": choices.get("taskpool"),
        "strategy": finetune.get("strategy", NO_FINETUNING),
        SEED: report.get("seed"),
    }
    for group, options in report.get("options", {}).items():
        row |= {f"{group}.{name}": _cell(value) for name, value in options.items()}
    selected = algorithm.get("selected_layers")
    consistency = algorithm.get("consistency", {})
    row |= {
        "training_seconds": finetune.get("seconds"),
        "peak_bytes": finetune.get("peak_bytes"),
        "memory": finetune.get("memory"),
        "trained_parameters": finetune.get("trained_parameters"),
        "batch_norm": algorithm.get("batch_norm"),
        "same_as": " ".join(finetune.get("same_as", [])),
        "merged_layers": None if selected is None else len(selected),
        "candidate_layers": algorithm.get("candidate_layers"),
        "consistency_all_layers": consistency.get("all layers", {}).get("mean"),
        "consistency_merged_layers": consistency.get("merged layers", {}).get("mean"),
        "run_seconds": report.get("seconds", {}).get("run"),
        "evaluate_seconds": report.get("seconds", {}).get("evaluate"),
    }
    return row | _alignment(algorithm.get("alignment")) | _evaluation(report)


def _evaluation(report: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = report.get("evaluation", {})
    row: dict[str, Any] = {}
    control = next(iter(report.get("controls", [])), None)
    row["control"] = control
    stages = {"merged": "merged", "finetuned": "finetuned", "control": control}
    for stage, entry in stages.items():
        for number, (task, metrics) in enumerate(evaluation.get(entry, {}).items()):
            for metric in ("accuracy", "f1"):
                if number == 0:  # the first task is the one that the study is about
                    row[f"{stage}_{metric}"] = metrics.get(metric)
                    row["images"] = metrics.get("images")
                row[f"{task}/{stage}/{metric}"] = metrics.get(metric)
    return row


def _alignment(alignment: Any) -> dict[str, Any]:
    """Return the alignment entries of a merge: whether it changed experts, and the cycle."""
    if not isinstance(alignment, Mapping):
        return {}
    cycles = [
        member["cycle_consistency"]
        for member in alignment.values()
        if isinstance(member, Mapping) and member.get("cycle_consistency") is not None
    ]
    changed = [
        bool(member["changed"])
        for member in alignment.values()
        if isinstance(member, Mapping) and "changed" in member
    ]
    return {
        "cycle_consistency": max(cycles) if cycles else None,
        "aligned": any(changed) if changed else None,
    }


def _cell(value: Any) -> Any:
    """Return a plain value as it is, a list or mapping as JSON: a cell that can be compared."""
    return json.dumps(value) if isinstance(value, list | dict) else value
