"""Controls of the benchmark: experts, ensemble, joint training, random layers."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from fusion.data import seed_from
from fusion.labels import LabelSpace
from fusion.merging.layer_scores import Ranking
from fusion.merging.rules import Mean, OwnTensors
from fusion.merging.rules.own_tensors import TensorKind
from fusion.method.base import BaseAlgorithm
from fusion.method.ensemble import ensemble_of
from fusion.method.merge import Merge
from fusion.method.presets import algorithm
from fusion.method.training_data import training_data
from fusion.modelpool import BaseModelPool, TrainedModel
from fusion.models import cost_of
from fusion.options import Count, Seed, Share, checked
from fusion.training import fit

log = logging.getLogger(__name__)

EXPERT, ENSEMBLE, JOINT = "expert: ", "ensemble", "joint training"
BASE, OWN, RANKED = "base", "own ", "ranked by "


class BenchmarkControls(BaseAlgorithm):
    """Build the networks with which every method of the benchmark is compared.

    The result is the simple average with recalibrated batch norm. Controls are the experts, their
    ensemble, the base with the experts' heads, the base trained on all tasks at once for as many
    images as the experts saw together, averages of a share of the layers chosen by each ranking
    and several times at random, and averages in which each task keeps one kind of tensor of its
    expert.

    Args:
        top_p: share of the layers that is merged under each ranking.
        draws: number of random selections.
        seed: of everything random.

    Raises:
        UserError: an invalid option.
    """

    @checked
    def __init__(self, *, top_p: Share = 0.5, draws: Count = 3, seed: Seed = 0) -> None:
        self.top_p = top_p
        self.draws = draws
        self.seed = seed
        self._average = Merge(rule=Mean(), seed=seed)

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the experts can be averaged.

        Raises:
            UserError: they cannot.
        """
        self._average.check_pool(modelpool)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the simple average; the other networks are controls."""
        self._average.fabric, self._average.progress = self.fabric, self.progress
        with quiet():
            return self._networks(modelpool)

    def _networks(self, modelpool: BaseModelPool) -> nn.Module:
        result = self._average.run(modelpool)
        conditions = {"merged": {"track": "average", **cost(result, modelpool)}}
        self.report.update(benchmarked="controls", conditions=conditions)
        for name in modelpool.model_names:
            load = partial(modelpool.load_model, name)
            self._add(modelpool, f"{EXPERT}{name}", load, modelpool.labels(name))
        self._add(modelpool, ENSEMBLE, partial(ensemble_of, modelpool))
        if modelpool.has_pretrained:
            self._merged(BASE, modelpool, "task_arithmetic", scale=0.0)
            for ranking in get_args(Ranking):
                if ranking != "random":
                    self._ranked(f"{RANKED}{ranking}", modelpool, ranking, self.seed)
            for draw in range(self.draws):
                seed = seed_from(self.seed, f"draw {draw}")
                self._ranked(f"{RANKED}random, draw {draw + 1}", modelpool, "random", seed)
        if len(modelpool.tasks) > 1:
            self._merged("average per task", modelpool, "simple_average", per_task=True)
            for kind in get_args(TensorKind):
                rule = {"_target_": f"{OwnTensors.__module__}.OwnTensors", "kind": kind}
                self._merged(f"{OWN}{kind}", modelpool, "merge", per_task=True, rule=rule)
        if (joint := self._joint(modelpool, result)) is not None:
            self._add(modelpool, JOINT, lambda: joint)
        return result

    def result_labels(self, modelpool: BaseModelPool) -> LabelSpace | None:
        """Return the classes of the average's outputs."""
        return self._average.result_labels(modelpool)

    def _add(
        self,
        modelpool: BaseModelPool,
        name: str,
        make: Callable[[], nn.Module],
        labels: LabelSpace | None = None,
    ) -> None:
        self.controls[name] = make
        condition = self.report["conditions"].setdefault(name, {"track": name})
        condition |= cost(make(), modelpool)
        if labels is not None:
            self.record.labels[name] = labels

    def _merged(
        self,
        name: str,
        modelpool: BaseModelPool,
        method: str,
        *,
        per_task: bool = False,
        **options: Any,
    ) -> None:
        treatment = "recalibrate_per_task" if per_task else "auto"
        options |= {"batch_norm": treatment, "seed": self.seed}
        seconds = self._run(name, modelpool, method, **options)
        self.report["conditions"][name] |= {"batch_norm": treatment, "seconds": seconds}

    def _ranked(self, name: str, modelpool: BaseModelPool, ranking: str, seed: int) -> None:
        self._run(
            name,
            modelpool,
            "snr_selective_merge",
            rank_by=ranking,
            top_p=self.top_p,
            weighting="equal",
            align=False,
            seed=seed,
        )

    def _run(self, name: str, modelpool: BaseModelPool, method: str, **options: Any) -> float:
        """Merge by a method immediately and name the result; return the seconds that it took."""
        made = algorithm(method, **options)
        made.fabric, made.progress = self.fabric, self.progress
        start = time.perf_counter()
        network = made.run(modelpool)
        seconds = time.perf_counter() - start
        self._add(modelpool, name, lambda: network, made.result_labels(modelpool))
        return seconds

    def _joint(self, modelpool: BaseModelPool, average: nn.Module) -> nn.Module | None:
        """Return a network trained on all tasks at once by the experts' recipe.

        It starts from the base with the experts' heads, or from fresh weights where there is no
        base. ``None`` where an expert is not a recipe, or where all have the same data.
        """
        recipes = [modelpool.entry(name).member for name in modelpool.model_names]
        if not all(isinstance(recipe, TrainedModel) for recipe in recipes) or not isinstance(
            modelpool.images(), Mapping
        ):
            return None
        first = recipes[0]
        assert isinstance(first, TrainedModel)
        if modelpool.has_pretrained:
            start = algorithm("task_arithmetic", scale=0.0, batch_norm="pretrained", seed=self.seed)
            start.fabric = self.fabric
            network = start.run(modelpool)
        else:
            network = _fresh(average, self.seed)
        begin = time.perf_counter()
        fit(
            network,
            training_data(network, self, modelpool),
            epochs=first.epochs,
            **first.training_options,
            seed=self.seed,
            fabric=self.fabric,
            progress=False,
        )
        self.report["conditions"][JOINT] = {"track": JOINT, "seconds": time.perf_counter() - begin}
        return network


def cost(network: nn.Module, modelpool: BaseModelPool) -> dict[str, int]:
    """Return ``parameters`` and ``multiply_adds`` of a network on the pool's images."""
    image = modelpool.example_input()
    return {} if image is None else asdict(cost_of(network, image.shape[1:]))


@contextmanager
def quiet() -> Iterator[None]:
    """Limit the log of methods and their merges to warnings; members still log their training."""
    loggers = [logging.getLogger(name) for name in ("fusion.method", "fusion.merging")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fresh(network: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a network with the initial weights of its modules."""
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, JOINT))
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return fresh
