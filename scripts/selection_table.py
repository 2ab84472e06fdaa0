"""Measure what layer selection is worth: every ranking, share, interpolation and batch norm.

One factor is varied at a time around LERP, ranked by the experts' SNR, with recalibrated batch
norm; the controls are the base as it is, the base with recalibrated batch norm, random selection,
the full merge, and joint fine-tuning of the base on all classes with the experts' budget of
images. The tables of docs/selection.md are what this prints:

    .venv/bin/python scripts/selection_table.py --seeds 5
    .venv/bin/python scripts/selection_table.py --pool cifar10_folder --seeds 3 \
        path.data_dir=FOLDER path.checkpoint=resnet20.safetensors
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from pools import settings

from fusion.merging.layer_scores import Ranking
from fusion.method import SNRSelectiveMerge
from fusion.modelpool import BaseModelPool
from fusion.target import build
from fusion.training import recalibrate_batch_norm

SHARES = (0.1, 0.15, 0.3, 1.0)
BASE, RECALIBRATED, JOINT = "base as it is", "base, batch norm recalibrated", "joint fine-tuning"
FULL = "lerp, experts, 100 %, recalibrate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pool", default="digits", help="name of a modelpool and a taskpool")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="keep every single run here")
    parser.add_argument("overrides", nargs="*", help="further options, as for fusion_bench")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("fusion.modelpool").setLevel(logging.INFO)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        rows += measure(arguments.pool, seed, arguments.overrides)
        logging.warning("seed %d: %.0f s", seed, time.perf_counter() - start)
        if arguments.csv:
            pd.DataFrame(rows).to_csv(arguments.csv, index=False)
    runs = pd.DataFrame(rows)
    print(markdown(runs))


def measure(pool_name: str, seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Return one row per model of this seed: its name and its accuracy on all classes."""
    pool, tasks = parts(pool_name, seed, overrides)
    whole = tasks.task_names[0]
    rows = []

    def add(name: str, result: dict[str, Any], share: float | None = None) -> None:
        task = whole if whole in result else next(iter(result))
        accuracy = 100 * result[task]["accuracy"]
        row = {"seed": seed, "model": name, "share": share, "task": task, "accuracy": accuracy}
        rows.append(row)

    base = pool.load_pretrained_model()
    add(BASE, tasks.evaluate(base))
    recalibrate_batch_norm(base, pool.images(), seed=seed)
    add(RECALIBRATED, tasks.evaluate(base))
    for name in pool:
        model = pool.load_model(name)
        add(f"{name} on its classes", tasks.evaluate(model, labels=pool.labels(name)))
    joint = pool.load_model("_joint_")
    add(JOINT, tasks.evaluate(joint))
    recalibrate_batch_norm(joint, pool.images(), seed=seed)
    add(f"{JOINT}, batch norm recalibrated", tasks.evaluate(joint))
    for name, options in variants():
        merge = SNRSelectiveMerge(**options, plot=False, seed=seed)
        merge.progress = False
        add(name, tasks.evaluate(merge.run(pool)), options["top_p"])
    return rows


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the options of every merge, one factor varied at a time."""
    rankings = [("lerp", rank, "recalibrate", "snr") for rank in get_args(Ranking)]
    interpolations = [(how, "experts", "recalibrate", "snr") for how in ("slerp", "ties")]
    treatments = [("lerp", "experts", how, "snr") for how in ("pretrained", "merge")]
    weightings = [("lerp", "experts", "recalibrate", "equal")]
    for how, rank, treatment, weighting in rankings + interpolations + treatments + weightings:
        for share in SHARES:
            if share == 1.0 and rank != "experts":
                continue  # everything is merged whatever the order
            name = label(how, rank, share, treatment)
            name += ", equal weights" if weighting == "equal" else ""
            options = {"interpolation": how, "rank_by": rank, "top_p": share}
            yield name, options | {"batch_norm": treatment, "weighting": weighting}


def label(how: str, rank: str, share: float, treatment: str) -> str:
    return f"{how}, {rank}, {100 * share:.0f} %, {treatment}"


def parts(name: str, seed: int, overrides: list[str]) -> tuple[BaseModelPool, Any]:
    """Build the pool with a control beside the experts, and the task pool, from the YAML."""
    values = settings(name, seed, overrides)
    experts = [model for key, model in values["modelpool"]["models"].items() if key[0] != "_"]
    joint = copy.deepcopy(experts[0])
    joint["architecture"]["num_classes"] = sum(e["architecture"]["num_classes"] for e in experts)
    joint["classes"] = None  # all of them, for as many epochs: as many images as the experts saw
    values["modelpool"]["models"]["_joint_"] = joint
    return build(values["modelpool"]), build(values["taskpool"])


def markdown(runs: pd.DataFrame) -> str:
    """Return mean ± standard error, and the differences from the controls, paired by seed."""
    wide = runs.pivot(index="seed", columns="model", values="accuracy")[runs["model"].unique()]
    about = runs.drop_duplicates("model").set_index("model")
    lines = [
        f"| model ({len(wide)} seeds) | accuracy, % "
        "| − recalibrated base | − random choice | − full merge |",
        "|---|---|---|---|---|",
    ]
    for model in wide:
        share = about.loc[model, "share"]
        chance = label("lerp", "random", share, "recalibrate") if share < 1 else None
        cells = [statistic(wide[model], signed=False)]
        for control in (RECALIBRATED, chance, FULL):
            compared = control in wide and control != model
            compared = compared and about.loc[model, "task"] == about.loc[control, "task"]
            cells.append(statistic(wide[model] - wide[control]) if compared else "")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def statistic(values: pd.Series, *, signed: bool = True) -> str:
    """Return ``mean ± standard error``, paired by seed, signed where it is a difference."""
    return f"{values.mean():{'+' if signed else ''}.1f} ± {values.sem():.1f}"


if __name__ == "__main__":
    main()
