"""Choose the options of any method on validation images."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import nn

from fusion.data import seed_from
from fusion.errors import UserError
from fusion.files import write_text
from fusion.labels import LabelSpace
from fusion.method.base import BaseAlgorithm
from fusion.method.presets import algorithm, configured
from fusion.modelpool import BaseModelPool
from fusion.options import NON_EMPTY, Count, Seed, TargetMapping, Text, checked
from fusion.taskpool import ClassificationTaskPool, Contestant

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # values tried by default


class Search(BaseAlgorithm):
    """Run a method with several options and return the best result on validation images.

    Each candidate is measured on the validation data of every expert, with the head of its task;
    the score is the mean over tasks of the accuracy as a share of the expert's own. The test set is
    never used. The report states the cost of the search.

    Args:
        method: the method that is searched: its name, as in ``fusion_bench method=…``, or a mapping
            with ``_target_``.
        options: name of an option → the values to try. Every combination is a candidate.
        fixed: name of an option → its value in all candidates.
        budget: number of measured candidates, drawn at random where there are more combinations;
            ``None`` measures all.
        split: the data that candidates are measured on: ``val``, or ``train`` where there is no
            other.
        seed: of the draw.

    Raises:
        UserError: an invalid option.
    """

    @checked
    def __init__(
        self,
        *,
        method: Text | TargetMapping = "task_arithmetic",
        options: Mapping[str, Annotated[Sequence[Any], NON_EMPTY]] | None = None,
        fixed: Mapping[str, Any] | None = None,
        budget: Count | None = None,
        split: Literal["train", "val"] = "val",
        seed: Seed = 0,
    ) -> None:
        self.options = dict(
            {"scale": [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]} if options is None else options
        )
        self.method = method
        self.fixed = dict(fixed or {})
        self.budget = budget
        self.split = split
        self.seed = seed
        for candidate in self.candidates():
            self._algorithm(candidate)  # a wrong option is an error now, not after an hour
        self._best: BaseAlgorithm | None = None
        self._rows: list[dict[str, Any]] = []

    def candidates(self) -> list[dict[str, Any]]:
        """Return the combinations of options that are tried, in their order."""
        names = list(self.options)
        every = [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*self.options.values())
        ]
        if self.budget is None or len(every) <= self.budget:
            return every
        generator = torch.Generator().manual_seed(seed_from(self.seed, "search"))
        chosen = torch.randperm(len(every), generator=generator)[: self.budget].sort().values
        return [every[index] for index in chosen.tolist()]

    @property
    def table(self) -> pd.DataFrame:
        """One row per candidate: its options, ``score``, each task's accuracy, ``seconds``."""
        import pandas as pd

        return pd.DataFrame(self._rows)

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the method can run on this pool, and that there are images to choose by.

        Raises:
            UserError: a requirement is missing.
        """
        self._algorithm(self.candidates()[0]).check_pool(modelpool)
        if not modelpool.has_data(self.split):
            raise UserError(
                f"search chooses options by the {self.split} images of every expert, and the pool "
                f"lacks some; add {self.split}_datasets"
                + ("" if self.split == "train" else ", or choose split=train")
            )

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the best of the candidates' results."""
        tasks = ClassificationTaskPool(
            {
                task: modelpool.dataset(names[0], self.split)
                for task, names in modelpool.tasks.items()
            },
            joint=None,
        )
        tasks.fabric = self.fabric
        own = self._own_accuracies(modelpool, tasks)
        best: tuple[float, nn.Module] | None = None
        self._rows = []
        for candidate in self.candidates():
            start = time.perf_counter()
            made = self._algorithm(candidate)
            made.fabric, made.progress = self.fabric, self.progress
            with self.profile("candidates"):
                network = made.run(modelpool)
                found = tasks.evaluate_all(
                    {"candidate": Contestant(lambda n=network: n, made.result_labels(modelpool))}  # type: ignore[misc]
                )["candidate"]
            accuracies = {task: found[task]["accuracy"] for task in found}
            shares = [accuracies.get(task, 0.0) / own[task] for task in own if own[task]]
            score = math.fsum(shares) / len(shares) if shares else 0.0
            seconds = time.perf_counter() - start
            self._rows.append({**candidate, "score": score, **accuracies, "seconds": seconds})
            log.info("%s: %.1f %% of the experts'", _shown(candidate), 100 * score)
            if best is None or score > best[0]:
                best, self._best = (score, network), made
                self.report["chosen"] = candidate
        assert best is not None
        assert self._best is not None
        self.controls.update(self._best.controls)
        self.record.labels.update(self._best.record.labels)
        self.report.update(
            candidates=len(self._rows),
            score=best[0],
            seconds=math.fsum(row["seconds"] for row in self._rows),
            method=self._best.report,
        )
        log.info("Chosen of %d candidates: %s", len(self._rows), _shown(self.report["chosen"]))
        if self.output_path is not None and self.fabric.is_global_zero:
            write_text(self.output_path / "search.csv", self.table.to_csv(index=False))
        return best[1]

    @property
    def selected_layers(self) -> list[str]:
        """The layers that the chosen candidate merged."""
        return [] if self._best is None else self._best.selected_layers

    def result_labels(self, modelpool: BaseModelPool) -> LabelSpace | None:
        """Return the classes of the result's outputs."""
        return (
            super().result_labels(modelpool)
            if self._best is None
            else (self._best.result_labels(modelpool))
        )

    def _algorithm(self, candidate: Mapping[str, Any]) -> BaseAlgorithm:
        options = {**self.fixed, **candidate}
        if isinstance(self.method, Mapping):
            return configured(self.method, str(self.method["_target_"]), **options)
        return algorithm(self.method, **options)

    def _own_accuracies(
        self, modelpool: BaseModelPool, tasks: ClassificationTaskPool
    ) -> dict[str, float]:
        found = {}
        for task, names in modelpool.tasks.items():
            result = tasks.evaluate_all(
                {
                    name: Contestant(lambda n=name: modelpool.load_model(n), modelpool.labels(name))  # type: ignore[misc]
                    for name in names
                }
            )
            known = [r[task]["accuracy"] for r in result.values() if task in r]
            if known:
                found[task] = max(known)
        return found


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"
