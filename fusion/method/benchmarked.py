"""Measure one method for the benchmark: two tracks, every treatment of batch norm."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from fusion.labels import LabelSpace
from fusion.merging.batch_norm import Calibration, statistics_keys
from fusion.merging.rule import Need
from fusion.method.base import BaseAlgorithm
from fusion.method.benchmark_controls import BenchmarkControls, cost, quiet
from fusion.method.presets import configured, has_option
from fusion.method.search import Search
from fusion.method.training_data import training_data
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.options import Seed, TargetMapping, Text, checked
from fusion.target import build
from fusion.training.head_refit import refit_heads

log = logging.getLogger(__name__)

Treatment = Literal["recalibrate", "recalibrate_per_task", "merge"]
WITHOUT_STATISTICS = "pretrained"  # of networks without running statistics: nothing to treat
DEFAULTS, CHOSEN = "defaults", "chosen"
ORACLE = "oracle head"


class Benchmarked(BaseAlgorithm):
    """Run a method under every condition of the benchmark.

    The result is the method with its defaults and recalibrated batch norm. Controls are the same
    under the other treatments of batch norm; the method with its deciding option chosen on
    validation images under the first treatment, with the same number of tries for every method; and
    the result with an oracle head, logistic regression on all labelled training images, which
    measures the quality of the features.

    A network without running statistics has no treatments; a pool with one task none per task.

    Args:
        method: mapping with ``_target_`` of the method.
        name: name of the method.
        choices: method → its deciding option → the values tried. A method without an entry is
            measured at its defaults alone.
        variants: method → name of a condition → options, each measured under the first treatment,
            with the deciding option chosen for the variant, in as many tries.
        common: options of all methods that have them, such as ``align`` for separately trained
            networks.
        treatments: of the running statistics, in the order of the report.
        oracle: whether the oracle head is measured.
        seed: of everything random in the method.

    Raises:
        UserError: an invalid option.
    """

    @checked
    def __init__(
        self,
        *,
        method: TargetMapping,
        name: Text,
        choices: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
        variants: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        common: Mapping[str, Any] | None = None,
        treatments: Sequence[Treatment] = ("recalibrate", "recalibrate_per_task", "merge"),
        oracle: bool = True,
        seed: Seed = 0,
    ) -> None:
        self.method = dict(method)
        self.name = name
        self.grid = dict((choices or {}).get(name, {}))
        self.variants = dict((variants or {}).get(name, {}))
        self.common = {k: v for k, v in (common or {}).items() if has_option(method, k)}
        self.treatments = tuple(treatments)
        self.oracle = oracle
        self.seed = seed
        made = build(self.method)
        self._as_it_is = made if isinstance(made, BenchmarkControls) else None
        self._labels: LabelSpace | None = None

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the method can run on this pool.

        Raises:
            UserError: a requirement is missing.
        """
        if self._as_it_is is not None:
            self._as_it_is.check_pool(modelpool)
            return
        configured(self.method, self.name).check_pool(modelpool)
        treatments = self._treatments(modelpool)
        for treatment in treatments:
            configured(self.method, self.name, **self._options(treatment)).check_pool(modelpool)
        for options in ({}, *self.variants.values()):
            fixed = {**self._options(treatments[0]), **options}
            if self.grid:
                self._search(fixed, modelpool).check_pool(modelpool)
            else:
                configured(self.method, self.name, **fixed).check_pool(modelpool)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the network under the first condition; the others are controls."""
        modelpool.train()
        if self._as_it_is is not None:
            return self._run_as_it_is(self._as_it_is, modelpool)
        conditions: dict[str, dict[str, Any]] = {}
        treatments = self._treatments(modelpool)
        result: nn.Module | None = None
        for treatment in treatments:
            algorithm = configured(self.method, self.name, **self._options(treatment))
            network = self._condition(
                algorithm, modelpool, DEFAULTS, treatment, conditions, is_result=result is None
            )
            if result is None:
                result, self._labels = network, algorithm.result_labels(modelpool)
                needs = {need.value for need in _needs(algorithm)}
        assert result is not None
        if self.grid:
            self._chosen(modelpool, treatments, conditions)
        for variant, options in self.variants.items():
            self._variant(variant, options, modelpool, treatments[0], conditions)
        if self.oracle:
            start = time.perf_counter()
            network = self._with_oracle_head(result, modelpool)
            conditions[ORACLE] = {
                "track": ORACLE,
                "batch_norm": treatments[0],
                "seconds": time.perf_counter() - start,
                **self._looked_at(modelpool, treatments[0]),
                "labels": sum(len(data) for data in _datasets(modelpool, "train")),
                **cost(network, modelpool),
            }
            self._add(ORACLE, network, self._labels)
        self.report.update(benchmarked=self.name, needs=sorted(needs), conditions=conditions)
        return result

    def result_labels(self, modelpool: BaseModelPool) -> LabelSpace | None:
        """Return the classes of the result's outputs."""
        del modelpool
        return self._labels

    def _chosen(
        self,
        modelpool: BaseModelPool,
        treatments: Sequence[str],
        conditions: dict[str, dict[str, Any]],
    ) -> None:
        """Choose the deciding option under the first treatment, and measure it under each."""
        first, *others = [t for t in treatments if t.startswith("recalibrate")] or treatments[:1]
        search = self._search(self._options(first), modelpool)
        self._condition(search, modelpool, CHOSEN, first, conditions)
        chosen = search.report["chosen"]
        for treatment in others:
            algorithm = configured(self.method, self.name, **self._options(treatment), **chosen)
            self._condition(algorithm, modelpool, CHOSEN, treatment, conditions)
        for treatment in (first, *others):
            self._count_choice(conditions[f"{CHOSEN}, {treatment}"], modelpool, chosen)

    def _variant(
        self,
        variant: str,
        options: Mapping[str, Any],
        modelpool: BaseModelPool,
        treatment: str,
        conditions: dict[str, dict[str, Any]],
    ) -> None:
        """Measure a variant, its deciding option chosen anew where the method has one."""
        fixed = {**self._options(treatment), **options}
        if not self.grid:
            algorithm = configured(self.method, self.name, **fixed)
            self._condition(algorithm, modelpool, variant, treatment, conditions)
            return
        search = self._search(fixed, modelpool)
        self._condition(search, modelpool, variant, treatment, conditions)
        condition = conditions[f"{variant}, {treatment}"]
        self._count_choice(condition, modelpool, search.report["chosen"])

    def _search(self, fixed: Mapping[str, Any], modelpool: BaseModelPool) -> Search:
        split = _split_of_choice(modelpool)
        return Search(method=self.method, options=self.grid, fixed=fixed, split=split)

    def _count_choice(
        self, condition: dict[str, Any], modelpool: BaseModelPool, chosen: Mapping[str, Any]
    ) -> None:
        labels = sum(len(data) for data in _datasets(modelpool, _split_of_choice(modelpool)))
        condition.update(chosen=chosen, labels=condition["labels"] + labels)

    def _condition(
        self,
        algorithm: BaseAlgorithm,
        modelpool: BaseModelPool,
        track: str,
        treatment: str,
        conditions: dict[str, dict[str, Any]],
        *,
        is_result: bool = False,
    ) -> nn.Module:
        algorithm.fabric, algorithm.progress = self.fabric, self.progress
        start = time.perf_counter()
        with quiet():
            network = algorithm.run(modelpool)
        name = "merged" if is_result else f"{track}, {treatment}"
        conditions[name] = {
            "track": track,
            "batch_norm": treatment,
            "seconds": time.perf_counter() - start,
            "chosen": algorithm.report.get("chosen"),
            **self._looked_at(modelpool, treatment),
            **cost(network, modelpool),
        }
        log.info("%s, %s: %.1f s", track, treatment, conditions[name]["seconds"])
        if not is_result:
            self._add(name, network, algorithm.result_labels(modelpool))
        return network

    def _add(self, name: str, network: nn.Module, labels: LabelSpace | None) -> None:
        self.controls[name] = lambda: network
        if labels is not None:
            self.record.labels[name] = labels

    def _treatments(self, modelpool: BaseModelPool) -> list[str]:
        if not statistics_keys(modelpool.architecture(modelpool.pretrained_or_first_name)):
            return [WITHOUT_STATISTICS]
        several = len(modelpool.tasks) > 1
        return [t for t in self.treatments if several or t != "recalibrate_per_task"]

    def _options(self, treatment: str) -> dict[str, Any]:
        chosen = "auto" if treatment == WITHOUT_STATISTICS else treatment
        return {**self.common, "batch_norm": chosen, "seed": self.seed}

    def _looked_at(self, modelpool: BaseModelPool, treatment: str) -> dict[str, int]:
        """Return how many ``images`` and ``labels`` a condition looks at, at most.

        Recalibration and statistics draw their samples independently; what both draw counts twice.
        """
        made = configured(self.method, self.name, **self._options(treatment))
        sizes = [len(data) for data in _datasets(modelpool, "train")]
        calibration = getattr(made, "calibration", Calibration()).images
        images = labels = 0
        if treatment == "recalibrate":
            images += min(calibration, sum(sizes))
        elif treatment == "recalibrate_per_task":
            images += sum(min(calibration, size) for size in sizes)
        needs = _needs(made)
        if needs & {Need.IMAGES, Need.LABELS}:
            sample = getattr(made, "sample", Calibration()).images
            seen = sum(min(sample, size) for size in sizes)
            images, labels = images + seen, seen if Need.LABELS in needs else 0
        return {"images": images, "labels": labels}

    def _with_oracle_head(self, result: nn.Module, modelpool: BaseModelPool) -> nn.Module:
        network = copy.deepcopy(result)
        data = training_data(network, self, modelpool)
        head = modelpool.head.tensors
        if isinstance(network, MultiTaskNetwork):
            assert isinstance(data, Mapping)
            networks = {task: network.for_task(task) for task in network.tasks}
            refit_heads(networks, data, head, jointly=_disjoint(network.labels))
        else:
            assert not isinstance(data, Mapping)
            refit_heads({"": network}, {"": data}, head)
        return network

    def _run_as_it_is(self, algorithm: BaseAlgorithm, modelpool: BaseModelPool) -> nn.Module:
        algorithm.fabric, algorithm.progress = self.fabric, self.progress
        result = algorithm.run(modelpool)
        self._labels = algorithm.result_labels(modelpool)
        self.controls.update(algorithm.controls)
        self.record.labels.update(algorithm.record.labels)
        self.report.update(algorithm.report)
        return result


def _datasets(modelpool: BaseModelPool, split: str) -> list[Any]:
    """Return the data sets of the experts; one that several share counts once."""
    if not modelpool.has_data(split):
        return []
    images = modelpool.images(split=split)
    return list(images.values()) if isinstance(images, Mapping) else [images]


def _split_of_choice(modelpool: BaseModelPool) -> Literal["val", "train"]:
    return "val" if modelpool.has_data("val") else "train"


def _needs(algorithm: BaseAlgorithm) -> set[Any]:
    rule = getattr(algorithm, "rule", None)
    return {*getattr(algorithm, "needs", ()), *getattr(rule, "needs", ())}


def _disjoint(labels: Mapping[str, LabelSpace | None]) -> bool:
    """Return whether the classes of all tasks are known and none stands in two of them."""
    spaces = [space for space in labels.values() if space is not None]
    return len(spaces) == len(labels) and all(
        one.is_disjoint(other) for one, other in itertools.combinations(spaces, 2)
    )
