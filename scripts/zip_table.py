"""Measure zipping on networks trained apart: accuracy against multiply-adds, one network to all.

    python scripts/zip_table.py --pool digits_split --seeds 3 --csv zip.csv --png docs/zip.png
    python scripts/zip_table.py --pool digits_pair --seeds 3 --csv zip.csv --png docs/zip.png

Every method runs with the defaults of its YAML but for what its name here says. A joint answer
over the classes of several heads takes the softmax within each; heads of the same classes are
averaged. Multiply-adds are those of all tasks' bodies, as a multiple of one network's: one where
the body runs once, the counted ones where there is a trunk with tails, and the number of networks
for the ensemble. A finished row is not measured again. ± is the standard error over seeds.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pools import settings
from torch import Tensor, nn

import fusion
from fusion.data import batches
from fusion.figures.style import COLORS, PNG_DPI, house_style, new_figure, palette
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork, cost_of
from fusion.target import build
from fusion.taskpool import Contestant

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "simple average": ("simple_average", {}),
    "permutation (by activations)": ("git_rebasin", {"by": "activations"}),
    "zip, beta 0": ("zipit", {"within_budget": 0.0}),
    "zip, beta 0.1": ("zipit", {"within_budget": 0.1}),
    "zip, beta 0.3": ("zipit", {}),
    "zip, beta 0.5": ("zipit", {"within_budget": 0.5}),
    "zip, beta 0.3, not folded": ("zipit", {"folded": False}),
    "cca": ("zipit", {"basis": "cca"}),
    "least squares": ("layerwise_least_squares", {}),
    "least squares, aligned": ("layerwise_least_squares", {"align": "activations"}),
    **{f"partial zip {b}": ("zipit", {"budget": b}) for b in (1.2, 1.4, 1.6, 1.8)},
    **{
        f"partial permutation {b}": ("zipit", {"budget": b, "basis": "permutation"})
        for b in (1.2, 1.4, 1.6, 1.8)
    },
    **{
        f"partial zip {b}, tails bit for bit": ("zipit", {"budget": b, "batch_norm": "recalibrate"})
        for b in (1.2, 1.4, 1.6, 1.8)
    },
}
ENSEMBLE = "ensemble"
CURVES = {
    "partial zip": "zip, beta 0.3",
    "partial permutation": "permutation (by activations)",
}
# pool -> task pool, and the one task that all its members know
TASKPOOLS = {"digits_split": ("digits_split", None), "digits_pair": ("digits", "digits")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", default="digits_split", choices=TASKPOOLS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path, required=True, help="one row per measurement")
    parser.add_argument("--png", type=Path, help="the figure, of both pools if they are in --csv")
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING, force=True)
    rows: list[dict[str, Any]] = []
    if arguments.csv.exists():
        rows = pd.read_csv(arguments.csv).to_dict("records")
    for seed in range(arguments.seeds):
        bench = Bench(arguments.pool, seed, overrides)
        for name in (*METHODS, ENSEMBLE):
            key = {"pool": arguments.pool, "seed": seed, "model": name}
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            start = time.perf_counter()
            network = bench.network(name)
            seconds = time.perf_counter() - start
            rows.append({**key, **bench.scores(network), "seconds": seconds})
            pd.DataFrame(rows).to_csv(arguments.csv, index=False)
            logging.warning("%s: %.1f %%", key, rows[-1]["joint"])
    runs = pd.DataFrame(rows)
    print(markdown(runs[runs["pool"] == arguments.pool]))
    if arguments.png:
        draw(runs, arguments.png)


class Bench:
    """The members of one seed, and how what is made of them is measured."""

    def __init__(self, pool: str, seed: int, overrides: list[str]) -> None:
        taskpool, self.of_all = TASKPOOLS[pool]
        values = settings(pool, seed, [*overrides, f"taskpool={taskpool}"])
        self.seed = seed
        self.pool: BaseModelPool = build(values["modelpool"])
        self.tasks = build(values["taskpool"])

    def network(self, name: str) -> nn.Module:
        """Return one model of the table."""
        if name == ENSEMBLE:
            members = {n: self.pool.load_model(n).eval() for n in self.pool.model_names}
            return MultiTaskNetwork(members, {n: self.pool.labels(n) for n in members})
        method, options = METHODS[name]
        return fusion.merge(self.pool, method, seed=self.seed, **options)

    def scores(self, network: nn.Module) -> dict[str, float]:
        """Return accuracies in percent, and multiply-adds as a multiple of one network's body."""
        found = {"joint": 0.0, "tasks": float("nan"), "cost": self.cost(network)}
        if self.of_all is None:
            result = self.tasks.evaluate_all({"m": Contestant(lambda: network)})["m"]
            own = [result[task]["accuracy"] for task in self.tasks.task_names]
            found["joint"] = 100 * result["joint"]["accuracy"]
            found["tasks"] = 100 * sum(own) / len(own)
        else:
            found["joint"] = 100 * self.accuracy_of_mean(network)
        return found

    @torch.no_grad()
    def accuracy_of_mean(self, network: nn.Module) -> float:
        """Return the accuracy of the mean of the heads' softmax."""
        network.eval()
        right = seen = 0
        for images, labels in batches(self.tasks.load_dataset(self.of_all), batch_size=500):
            scores: list[Tensor] = (
                list(network.outputs(images).values())
                if isinstance(network, MultiTaskNetwork)
                else [network(images)]
            )
            mean = torch.stack([one.softmax(1) for one in scores]).mean(0)
            right += int((mean.argmax(1) == labels).sum())
            seen += len(labels)
        return right / seen

    def cost(self, network: nn.Module) -> float:
        """Return the multiply-adds of all bodies; heads are left out."""
        shape = self.pool.dataset(self.pool.model_names[0])[0][0].shape
        one = self.pool.load_model(self.pool.model_names[0])
        body = cost_of(one, shape).multiply_adds - one.linear.weight.numel()
        parts = network.networks if isinstance(network, MultiTaskNetwork) else [network]
        heads = sum(part.linear.weight.numel() for part in parts)
        return (cost_of(network, shape).multiply_adds - heads) / body


def markdown(runs: pd.DataFrame) -> str:
    """Return one row per model."""
    several = bool(runs["tasks"].notna().any())
    head = ["model", "multiply-adds", "joint accuracy (%)"]
    head += ["mean over tasks (%)"] if several else []
    lines = [f"| {' | '.join([*head, 'seconds'])} |", "|---|" + "---|" * len(head)]
    for name in runs["model"].unique():
        rows = runs[runs["model"] == name]
        cells = [name, f"{rows['cost'].mean():.2f}", statistic(rows["joint"])]
        cells += [statistic(rows["tasks"])] if several else []
        cells.append(f"{rows['seconds'].median():.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def statistic(values: pd.Series) -> str:
    """Return ``mean ± standard error``."""
    return f"{values.mean():.1f} ± {values.sem():.1f}"


def draw(runs: pd.DataFrame, png: Path) -> None:
    """Draw accuracy against multiply-adds, one panel per pool."""
    pools = list(runs["pool"].unique())
    with house_style():
        figure = new_figure(width=2.9 * len(pools), height=2.7)
        for place, pool in enumerate(pools):
            axes = figure.add_subplot(1, len(pools), place + 1)
            here = runs[runs["pool"] == pool].groupby("model")[["cost", "joint"]]
            mean, error = here.mean(), here.sem()
            for (curve, start), member in zip(CURVES.items(), palette(2), strict=True):
                budgets = [n for n in mean.index if n.startswith(curve) and "tails" not in n]
                names = [start, *sorted(budgets), ENSEMBLE]
                axes.errorbar(
                    mean["cost"][names], mean["joint"][names], yerr=error["joint"][names],
                    color=member.color, marker=member.marker, markersize=4, capsize=2, label=curve,
                )  # fmt: skip
            for name in ("simple average", "cca", "least squares"):
                axes.plot(1, mean["joint"][name], "_", color=COLORS[-1], markersize=9)
                axes.annotate(
                    name, (1, mean["joint"][name]), (7, 0), textcoords="offset points",
                    fontsize=6, va="center",
                )  # fmt: skip
            axes.set_title(pool)
            axes.set_xlabel("multiply-adds, of one network's")
            axes.set_ylabel("joint test accuracy (%)" if place == 0 else "")
            axes.legend(loc="lower right")
        figure.savefig(png, dpi=PNG_DPI)


if __name__ == "__main__":
    main()
