"""Is the closed form worth it? Layerwise least squares beside distillation by gradients.

    python scripts/benchmark_regression.py --seeds 3
    python scripts/benchmark_regression.py --pool cifar10_folder_tasks --seeds 1 \
        path.data_dir=FOLDER path.checkpoint=resnet20.safetensors

Both start from the average of the experts, see the same unlabelled images of each expert and keep
the experts' heads. Distillation takes Adam steps on the squared error between the logits of the
network and of the expert, for as long as the closed form takes, and for 5 and 20 times as long; of
several learning rates the best on the test images counts, which flatters it. Running statistics are
recalibrated afterwards. The score is the mean over tasks of the accuracy as a share of the
expert's, in percent: mean and standard error over seeds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from typing import Any

import pandas as pd
import torch
from pools import settings
from torch import Tensor, nn

import fusion
from fusion.data import few
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.target import build
from fusion.taskpool import Contestant
from fusion.training import recalibrate_batch_norm

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
FACTORS = (1, 5, 20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", default="digits_tasks", help="name of a modelpool and a taskpool")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200, help="of each expert")
    parser.add_argument("--batch-size", type=int, default=32, help="of each task, in distillation")
    arguments, overrides = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        rows += measure(arguments, seed, overrides)
        print(pd.DataFrame(rows)[-2 - len(FACTORS) :].to_string(index=False, header=seed == 0))
    frame = pd.DataFrame(rows)
    print("\n| method | seconds | % of the experts |\n|---|---|---|")
    for name, of_method in frame.groupby("method", sort=False):
        score = of_method["score"]
        print(
            f"| {name} | {of_method['seconds'].median():.1f} "
            f"| {score.mean():.1f} ± {score.sem():.1f} |"
        )


def measure(arguments: argparse.Namespace, seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    values = settings(arguments.pool, seed, overrides)
    pool: BaseModelPool = build(values["modelpool"])
    tasks = build(values["taskpool"])
    experts = {name: pool.load_model(name).eval() for name in pool}
    drawn = {n: few(pool.dataset(n), arguments.images, seed=seed, stratified=False) for n in pool}
    small = BaseModelPool(
        {name: pool.load_model(name) for name in pool.all_model_names},
        train_datasets=drawn,
        classes={n: list(labels) for n in pool if (labels := pool.labels(n)) is not None},
    )
    own = {
        pool.task(n): tasks.evaluate_all(
            {"m": Contestant(lambda e=expert: e, pool.labels(n))}  # type: ignore[misc]
        )["m"][pool.task(n)]["accuracy"]
        for n, expert in experts.items()
    }

    def score(network: nn.Module) -> float:
        found = tasks.evaluate_all({"m": Contestant(lambda: network)})["m"]
        return 100 * sum(found[task]["accuracy"] / own[task] for task in own) / len(own)

    def merged(method: str, **options: Any) -> tuple[MultiTaskNetwork, float]:
        start = time.perf_counter()
        network = fusion.merge(small, method, batch_norm="recalibrate", plot=False, **options)
        assert isinstance(network, MultiTaskNetwork)
        return network, time.perf_counter() - start

    merged("simple_average")  # the first call also imports
    average, seconds = merged("simple_average")
    rows = [{"seed": seed, "method": "average", "seconds": seconds, "score": score(average)}]
    solved, budget = merged("layerwise_least_squares", statistics_images=arguments.images)
    rows.append({**rows[0], "method": "least squares", "seconds": budget, "score": score(solved)})
    images = {n: torch.stack([data[i][0] for i in range(len(data))]) for n, data in drawn.items()}
    with torch.no_grad():
        wanted = {name: experts[name](images[name]) for name in experts}
    best = dict.fromkeys(FACTORS, 0.0)
    for rate in RATES:
        network = copy.deepcopy(average)
        for factor, student in distilled(
            network, images, wanted, pool, rate, budget, arguments.batch_size, seed
        ):
            recalibrate_batch_norm(student.networks[0], small.images(), seed=seed)
            best[factor] = max(best[factor], score(student))
    for factor in FACTORS:
        name = f"distillation, {factor} × its time"
        rows.append(
            {"seed": seed, "method": name, "seconds": factor * budget, "score": best[factor]}
        )
    return rows


def distilled(
    network: MultiTaskNetwork,
    images: dict[str, Tensor],
    wanted: dict[str, Tensor],
    pool: BaseModelPool,
    rate: float,
    budget: float,
    batch_size: int,
    seed: int,
) -> Any:
    """Yield (factor, a copy of the network) whenever so many budgets of time are used up."""
    body = [p for name, p in network.networks[0].named_parameters() if name not in pool.head]
    optimiser = torch.optim.Adam(body, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    network.eval()  # running statistics stay: batches of one task are not the mixture
    factors = iter(FACTORS)
    factor = next(factors)
    used = 0.0
    for _ in itertools.count():
        start = time.perf_counter()
        optimiser.zero_grad()
        for name, of_task in images.items():
            chosen = torch.randint(len(of_task), (batch_size,), generator=generator)
            error = network(of_task[chosen], task=pool.task(name)) - wanted[name][chosen]
            (error.square().mean() / wanted[name].var()).backward()
        optimiser.step()
        used += time.perf_counter() - start
        if used >= factor * budget:
            yield factor, copy.deepcopy(network)
            following = next(factors, None)
            if following is None:
                return
            factor = following


if __name__ == "__main__":
    main()
