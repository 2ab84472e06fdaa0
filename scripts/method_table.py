"""Measure every method on experts of several tasks: shares of the experts' accuracy, and controls.

    python scripts/method_table.py --pool digits_tasks --seeds 5 --csv digits.csv
    python scripts/method_table.py --pool cifar10_folder_tasks --seeds 3 --csv cifar10.csv \
        path.data_dir=FOLDER path.checkpoint=resnet20.safetensors

Each method runs with the defaults of its YAML and, where it has an option that decides (a scale, a
ridge, a density), with that option chosen from five values: on the pool's validation images, or
on 500 of each expert's training images where there are none. Every network is measured under one
set of recalibrated running statistics and under one set for each task. A finished row is not
measured again: start the command anew with the same --csv to go on.

The score is the mean over tasks of the accuracy as a share of that task's expert's. Differences
are paired by seed; ± is the standard error over seeds.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from pools import settings
from torch import nn

import fusion
from fusion.data import few
from fusion.method import Search
from fusion.method.presets import algorithm
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.target import build
from fusion.taskpool import Contestant
from fusion.training import fit, recalibrate_batch_norm

SCALES = [0.2, 0.4, 0.6, 0.8, 1.0]
LARGE_SCALES = [0.5, 0.75, 1.0, 1.25, 1.5]
RIDGES = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
# method -> the option that is chosen, and its values; none where the method has no such option
METHODS: dict[str, dict[str, list[Any]]] = {
    "simple_average": {},
    "slerp": {},
    "model_stock": {},
    "task_arithmetic": {"scale": SCALES},
    "ties_merging": {"scale": LARGE_SCALES},
    "dare": {"scale": SCALES},
    "magmax": {"scale": SCALES},
    "pcb": {"scale": LARGE_SCALES},
    "consensus_ta": {"scale": SCALES},
    "lines": {"beta": [0.1, 0.25, 0.5, 0.75, 1.0]},
    "task_singular_vectors": {"scale": LARGE_SCALES},
    "iso_c": {"scale": LARGE_SCALES},
    "iso_cts": {"scale": LARGE_SCALES},
    "wudi": {"ridge": RIDGES},
    "fisher_merging": {"floor": [1e-8, 1e-6, 1e-4, 1e-2, 1.0]},
    "regmean": {"off_diagonal": [0.5, 0.8, 0.9, 0.95, 1.0]},
    "regmean sequential": {"off_diagonal": [0.5, 0.8, 0.9, 0.95, 1.0]},
    "layerwise_least_squares": {"ridge": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]},
    "adamerging": {},
    "emr_merging": {},
}
FIXED = {"regmean sequential": ("regmean", {"sequential": True})}
TREATMENTS = {"recalibrate": "mixed", "recalibrate_per_task": "per task"}
BASE, RANDOM, JOINT = "base, experts' heads", "average of random half", "joint fine-tuning"
REFERENCE = "task_arithmetic, chosen"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", default="digits_tasks", help="name of a modelpool and a taskpool")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="one row per measurement; read to go on")
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="methods to measure")
    parser.add_argument("--defaults", action="store_true", help="do not choose any option")
    parser.add_argument("overrides", nargs="*", help="further options, as for fusion_bench")
    arguments, more = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING)
    rows: list[dict[str, Any]] = []
    if arguments.csv and arguments.csv.exists():
        rows = pd.read_csv(arguments.csv).to_dict("records")
    for seed in range(arguments.seeds):
        bench = Bench(arguments.pool, seed, [*arguments.overrides, *more])
        for name, treatment, make in bench.networks(arguments.only, not arguments.defaults):
            key = {"seed": seed, "model": name, "batch_norm": TREATMENTS[treatment]}
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            start = time.perf_counter()
            network = make()
            seconds = time.perf_counter() - start
            rows.append({**key, **bench.scores(network), "seconds": seconds})
            if arguments.csv:
                pd.DataFrame(rows).to_csv(arguments.csv, index=False)
            logging.warning("%s: %.1f %%", key, rows[-1]["score"])
    print(markdown(pd.DataFrame(rows)))


class Bench:
    """The members of one seed, what is made of them, and how it is measured."""

    def __init__(self, pool: str, seed: int, overrides: list[str]) -> None:
        values = settings(pool, seed, overrides)
        self.seed = seed
        self._recipes = values["modelpool"]["models"]
        self.pool: BaseModelPool = build(values["modelpool"])
        self.tasks = build(values["taskpool"])
        self._own: dict[str, float] = {}

    def networks(
        self, methods: list[str], choose: bool
    ) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
        """Yield name, treatment of running statistics, and the function that makes the network."""
        for treatment in TREATMENTS:
            common = {"batch_norm": treatment, "seed": self.seed}

            def merged(name: str, common: dict[str, Any] = common, **more: Any) -> nn.Module:
                preset, fixed = FIXED.get(name, (name, {}))
                return fusion.merge(self.pool, preset, **{**common, **fixed, **more})

            yield BASE, treatment, lambda m=merged: m("task_arithmetic", scale=0.0)
            yield (
                RANDOM,
                treatment,
                lambda m=merged: m("snr_selective_merge", rank_by="random", top_p=0.5, align=False),
            )
            for name in methods:
                yield name, treatment, lambda m=merged, n=name: m(n)
                if METHODS[name] and choose:
                    yield (
                        f"{name}, chosen",
                        treatment,
                        lambda n=name, c=common: self._chosen(n, c),
                    )
            yield JOINT, treatment, lambda t=treatment: self._joint(t)

    def scores(self, network: nn.Module) -> dict[str, float]:
        """Return the score of a network, its worst task, and the accuracy of each task, in %."""
        if not self._own:
            for name in self.pool:
                contestant = Contestant(
                    lambda n=name: self.pool.load_model(n), self.pool.labels(name)
                )
                task = self.pool.task(name)
                self._own[task] = self.tasks.evaluate_all({"m": contestant})["m"][task]["accuracy"]
        found = self.tasks.evaluate_all({"m": Contestant(lambda: network)})["m"]
        shares = {task: 100 * found[task]["accuracy"] / own for task, own in self._own.items()}
        accuracies = {task: 100 * found[task]["accuracy"] for task in self._own}
        return {
            "score": sum(shares.values()) / len(shares),
            "worst": min(shares.values()),
        } | accuracies

    def _chosen(self, name: str, common: dict[str, Any]) -> nn.Module:
        preset, fixed = FIXED.get(name, (name, {}))
        pool = self.pool
        if not pool.has_data("val"):
            members = {member: pool.load_model(member) for member in pool.all_model_names}
            training = {member: pool.dataset(member) for member in pool}
            pool = BaseModelPool(
                members,
                train_datasets=training,
                val_datasets={n: few(d, 500, seed=self.seed) for n, d in training.items()},
                classes={n: list(labels) for n in pool if (labels := pool.labels(n)) is not None},
            )
        search = Search(method=preset, options=METHODS[name], fixed={**common, **fixed})
        return search.run(pool)

    def _joint(self, treatment: str) -> nn.Module:
        """Return the base trained on all tasks at once, for as many images as all experts saw."""
        network = fusion.merge(
            self.pool, "task_arithmetic", scale=0.0, batch_norm="pretrained", head="tasks"
        )
        assert isinstance(network, MultiTaskNetwork)
        tasks = {task: self.pool.dataset(names[0]) for task, names in self.pool.tasks.items()}
        recipe = self._recipes[self.pool.model_names[0]]
        fit(
            network,
            tasks,
            epochs=recipe["epochs"],
            lr=recipe["lr"],
            batch_size=recipe.get("batch_size", 128),
            seed=self.seed,
            progress=False,
        )
        recalibrate_batch_norm(network.networks[0], self.pool.images(), seed=self.seed)
        if treatment == "recalibrate":
            return network
        own = algorithm("simple_average", batch_norm=treatment, seed=self.seed).run(self.pool)
        for task, data in tasks.items():
            body = own.for_task(task)
            body.load_state_dict(network.for_task(task).state_dict())
            recalibrate_batch_norm(body, data, seed=self.seed)
        return own


def markdown(runs: pd.DataFrame) -> str:
    """Return one row per model: score under both treatments, and the difference from the tuned
    task arithmetic.
    """
    names = list(runs["model"].unique())
    wide = runs.pivot(index="seed", columns=["model", "batch_norm"], values="score")
    worst = runs.pivot(index="seed", columns=["model", "batch_norm"], values="worst")
    treatments = [t for t in TREATMENTS.values() if t in set(runs["batch_norm"])]
    heads = [
        f"{what}{t}"
        for t in treatments
        for what in ("", "worst task, ", "− chosen task arithmetic, ")
    ]
    lines = [
        f"| model ({len(wide)} seeds), % of the experts | {' | '.join(heads)} | seconds |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for name in names:
        cells = []
        for t in treatments:
            here = (name, t) in wide
            cells.append(statistic(wide[name, t], signed=False) if here else "")
            cells.append(f"{worst[name, t].mean():.0f}" if here else "")
            compared = here and (REFERENCE, t) in wide and name != REFERENCE
            cells.append(statistic(wide[name, t] - wide[REFERENCE, t]) if compared else "")
        seconds = runs[runs["model"] == name]["seconds"].median()
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def statistic(values: pd.Series, *, signed: bool = True) -> str:
    """Return ``mean ± standard error``, signed where it is a difference."""
    return f"{values.mean():{'+' if signed else ''}.1f} ± {values.sem():.1f}"


if __name__ == "__main__":
    main()
