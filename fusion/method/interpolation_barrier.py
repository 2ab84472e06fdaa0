"""Accuracy and loss on the line between two networks: naive, aligned, repaired."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import nn
from tqdm import tqdm

from fusion.alignment import align
from fusion.alignment.align import By
from fusion.errors import UserError
from fusion.files import write_text
from fusion.merging import batch_norm as bn
from fusion.merging.alignment import AlignmentStage, activation_images, symmetries
from fusion.merging.averaging import mean_network
from fusion.merging.heads import plan_heads
from fusion.method.base import BaseAlgorithm
from fusion.modelpool import BaseModelPool
from fusion.options import NON_EMPTY, SampleSize, Seed, Within, checked
from fusion.taskpool import ClassificationTaskPool
from fusion.training import MemberStatistics
from fusion.weights import tensors_of

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Alignment = Literal["none", "weights", "activations"]
Treatment = Literal["interpolate", "merge", "recalibrate", "repair"]  # of batch norm, at each point
Points = Annotated[int, Within(least=3, most=10_001)]


class InterpolationBarrier(BaseAlgorithm):
    """Measure networks on the line from the pool's first expert to its second.

    The second network is taken as it is, or aligned to the first by weights or by activations; at
    each point between them batch norm's statistics are interpolated like every other tensor, those
    of the mixture, recalibrated, or repaired (REPAIR, arXiv 2211.08403). The barrier is the largest
    fall below the line between the ends (Frankle et al., arXiv 1912.05671; Git Re-Basin, arXiv
    2209.04836).

    Returns the first network. After ``run``, ``table`` holds what ``barrier.csv`` and
    ``barrier.pdf``/``.png`` show.

    Args:
        alignments: of ``none``, ``weights``, ``activations``.
        batch_norm: of ``interpolate``, ``merge``, ``recalibrate``, ``repair``.
        points: number of measured points of the line, including its ends; odd.
        calibration_images: maximum number of training images.
        batch_size: images per forward pass.
        plot: whether to draw the figure.
        seed: of the descent's order and the sample of images.

    Raises:
        UserError: an invalid option.
    """

    @checked
    def __init__(
        self,
        *,
        alignments: Annotated[Sequence[Alignment], NON_EMPTY] = ("none", "weights", "activations"),
        batch_norm: Annotated[Sequence[Treatment], NON_EMPTY] = (
            "interpolate",
            "recalibrate",
            "repair",
        ),
        points: Points = 11,
        calibration_images: SampleSize = 2000,
        batch_size: SampleSize = 128,
        plot: bool = True,
        seed: Seed = 0,
    ) -> None:
        if points % 2 == 0:
            raise UserError(f"points is {points}; a line with a point midway takes an odd number")
        self.alignments = list(alignments)
        self.batch_norm = list(batch_norm)
        self.points = points
        self.calibration = bn.Calibration(calibration_images, batch_size, seed)
        self.plot = plot
        self.seed = seed
        self._rows: list[dict[str, Any]] = []

    @property
    def table(self) -> pd.DataFrame:
        """One row for each alignment, treatment and point ``t``: ``accuracy`` and ``loss``."""
        import pandas as pd

        return pd.DataFrame(self._rows)

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that there are two networks of one architecture, and images to measure them on.

        Raises:
            UserError: a requirement is missing.
        """
        if len(modelpool) != 2:
            raise UserError(
                f"interpolation_barrier walks between two experts, and the pool has "
                f"{len(modelpool)}; name two"
            )
        modelpool.preflight()
        for split in ("train", "test"):
            if not modelpool.has_data(split):
                raise UserError(f"interpolation_barrier needs images; add {split}_datasets")
        plan = plan_heads(modelpool)
        if plan.kind != "merged":
            first, second = modelpool.model_names
            raise UserError(
                f"'{first}' and '{second}' have different classes; a line needs two networks of "
                f"one label space"
            )
        AlignmentStage().check(modelpool)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Measure the line; return the first network."""
        first, second = (modelpool.load_model(name).eval() for name in modelpool.model_names)
        name = modelpool.model_names[0]
        tasks = ClassificationTaskPool({name: modelpool.dataset(name, "test")})
        tasks.fabric = self.fabric
        labels = plan_heads(modelpool).labels
        networks: dict[str, nn.Module] = {"first": first}
        for how in self.alignments:
            networks[how] = self._aligned(second, first, how, modelpool)
        # Values common to all points of a line, or to all lines, are measured once.
        measured: dict[str, MemberStatistics] = {}
        if "repair" in self.batch_norm:
            measured = self._statistics(networks, modelpool)
        scores: dict[str, Mapping[str, float]] = {}
        grid = list(itertools.product(self.alignments, self.batch_norm, range(self.points)))
        self._rows = []
        hidden = None if self.progress is None else not self.progress
        for how, treatment, point in tqdm(grid, desc="Walking", unit="point", disable=hidden):
            t = point / (self.points - 1)
            if t in (0.0, 1.0):
                end = how if t else "first"
                if end not in scores:
                    scores[end] = tasks.evaluate(networks[end], labels=labels)[name]
                found = scores[end]
            else:
                weights = [1 - t, t]
                between = self._between([first, networks[how]], weights, treatment)
                if treatment == "recalibrate":
                    bn.recalibrate(between, modelpool, self.fabric, self.calibration)
                elif treatment == "repair":
                    members = [measured["first"], measured[how]]
                    bn.repair_mean(
                        between, members, modelpool, self.fabric, self.calibration, weights=weights
                    )
                found = tasks.evaluate(between, labels=labels)[name]
            self._rows.append(
                {
                    "alignment": how,
                    "batch_norm": treatment,
                    "t": t,
                    "accuracy": found["accuracy"],
                    "loss": found["loss"],
                }
            )
        self.report["barrier"] = barriers(self.table).to_dict(orient="records")
        self._write()
        return first

    def _aligned(
        self, model: nn.Module, reference: nn.Module, how: str, modelpool: BaseModelPool
    ) -> nn.Module:
        if how == "none":
            return model
        by: By = "activations" if how == "activations" else "weights"
        data = None
        if by == "activations":
            data = activation_images(modelpool, self.calibration)
        with self.profile(f"align by {how}"):
            return align(
                model,
                reference,
                spec=symmetries(reference, modelpool),
                by=by,
                data=data,
                seed=self.seed,
                device=self.fabric.device,
            ).model

    def _statistics(
        self, networks: Mapping[str, nn.Module], pool: BaseModelPool
    ) -> dict[str, MemberStatistics]:
        with self.profile("statistics of the ends"):
            return {
                name: bn.member_statistics(network, pool, self.fabric, self.calibration)
                for name, network in networks.items()
            }

    @staticmethod
    def _between(
        networks: Sequence[nn.Module], weights: Sequence[float], treatment: str
    ) -> nn.Module:
        return mean_network(
            networks[0],
            [tensors_of(network) for network in networks],
            weights,
            statistics="merge" if treatment == "merge" else "interpolate",
        )

    def _write(self) -> None:
        for row in self.report["barrier"]:
            log.info(
                "%s alignment, batch norm %s: midpoint %.1f %%, barrier %.1f points, %.2f nats",
                row["alignment"],
                row["batch_norm"],
                100 * row["midpoint"],
                100 * row["barrier"],
                row["loss_barrier"],
            )
        if self.output_path is not None and self.fabric.is_global_zero:
            write_text(self.output_path / "barrier.csv", self.table.to_csv(index=False))
            if self.plot:
                from fusion.figures.barrier import barrier_figure
                from fusion.figures.style import save_figure

                save_figure(barrier_figure(self.table), self.output_path, "barrier")


def barriers(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each alignment and treatment the midpoint's accuracy and the barrier.

    ``barrier`` is the largest fall of the accuracy below the line between the ends (0..1),
    ``loss_barrier`` the largest rise of the loss above it (nats); 0 at least.
    """
    import pandas as pd

    rows = []
    for (how, treatment), line in table.groupby(["alignment", "batch_norm"], sort=False):
        t, accuracy, loss = line.sort_values("t")[["t", "accuracy", "loss"]].to_numpy(float).T
        expected, bound = (ends[0] + (ends[-1] - ends[0]) * t for ends in (accuracy, loss))
        rows.append(
            {
                "alignment": how,
                "batch_norm": treatment,
                "midpoint": float(accuracy[abs(t - 0.5).argmin()]),
                "barrier": float((expected - accuracy).max()),
                "loss_barrier": float((loss - bound).max()),
            }
        )
    return pd.DataFrame(rows)
