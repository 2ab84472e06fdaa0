"""Merge the layers whose weights stand out from noise; keep the base's weights elsewhere."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from fusion.errors import UserError, suggestion
from fusion.files import write_text
from fusion.merging import batch_norm as bn
from fusion.merging import layer_scores as scores
from fusion.merging import notebook
from fusion.merging.heads import HeadChoice, HeadPlan, plan_heads
from fusion.merging.layer_scorer import LayerScorer
from fusion.merging.layer_scores import LayerRecord
from fusion.merging.members import LayerChoice, Members, layers_of
from fusion.merging.rule import Need, Rule
from fusion.merging.rules import Mean, Slerp, Ties
from fusion.method.consistency import write_consistency
from fusion.method.merge import Merge
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.models import Layer
from fusion.options import Fraction, ImageShape, Names, SampleSize, Seed, Share, checked
from fusion.spectrum import layer_snr
from fusion.spectrum.noise_model import Level, SigmaRule, ThresholdRule
from fusion.weights import exact_device

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Weighting = Literal["snr", "equal"]
Interpolation = Literal["lerp", "slerp", "ties"]
Scoring = Literal["calibrated", "uncalibrated", "notebook"]


class SNRSelectiveMerge(Merge):
    """Merge experts into their base, layer-selectively by signal-to-noise ratio.

    A layer is a convolution or linear module with all its parameters and the normalisation that
    follows it. Every layer is scored in every member by the singular values of its weight against
    the noise that random-matrix theory predicts (:func:`fusion.spectrum.layer_snr`; after
    "Spectrum", arXiv 2406.06623). The top ceil(top_p·L) layers become a mean of the experts', all
    others stay the base's.

    After ``run``, ``selected_layers`` and ``layer_table`` list the merged layers; with an
    ``output_path`` the table is in ``layers.csv`` and drawn in ``layers.pdf`` and ``.png``.

    Args:
        top_p: share of the layers that is merged, in [0, 1].
        rank_by: ``pretrained`` (the base's SNR), ``experts`` (mean of the experts'),
            ``task_vector`` (mean SNR of expert − base), ``similarity`` (mean cosine of the experts'
            changes), ``hybrid`` (SNR and 1.7 × similarity, each scaled to [0, 1]), ``norm``
            (relative size of the changes), ``random`` (seeded: the control), or a list of layer
            names, which are merged regardless of ``top_p``.
        weighting: shares of the experts in each layer: ``snr`` (in proportion to their SNR, equal
            where all are 0), ``equal``, or one number per expert as a list or by name.
        interpolation: ``lerp`` (weighted mean), ``slerp`` (on the sphere), ``ties``.
        scoring: ``calibrated``, or ``uncalibrated`` (the formula without the factor √b, norm layers
            ranked by themselves; kept for comparison only).
        batch_norm, head: see :class:`~fusion.method.Merge`. A head that is not merged like other
            layers cannot be selected.
        sigma, threshold, alpha: of the noise model, see :func:`fusion.spectrum.layer_snr`.
        density: of TIES: the share of each change that is kept, in (0, 1]; 0.2 by default. Under
            ``scoring=uncalibrated`` it has no effect: that rule trims nothing.
        scale: of TIES: the factor λ of the merged change; 1 by default, likewise.
        calibration_images: maximum number of images for ``recalibrate``.
        batch_size: images per forward pass of the recalibration.
        align: first bring the experts' units into the base's order (:func:`fusion.alignment.align`;
            in experts fine-tuned from the base usually nothing moves, which the report states).
            A network whose symmetries cannot be found is an error: nothing is skipped silently.
        example_input: shape of one image, (C, H, W), for ``align``; by default the pool's first
            training image, or else a guess from the first convolution.
        plot: whether to draw the figures.
        seed: of the random ranking and the calibration sample.

    Raises:
        UserError: an invalid option.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    without_alignment: ClassVar[str] = "align=false"

    @checked
    def __init__(
        self,
        *,
        top_p: Share = 0.1,
        rank_by: scores.Ranking | Names = "experts",
        weighting: Weighting | Sequence[float] | Mapping[str, float] = "snr",
        interpolation: Interpolation = "lerp",
        scoring: Scoring = "calibrated",
        batch_norm: bn.Treatment = "auto",
        head: HeadChoice = "auto",
        sigma: SigmaRule = "median",
        threshold: ThresholdRule = "tracy_widom",
        alpha: Level = 0.01,
        density: Fraction | None = None,
        scale: float | None = None,
        calibration_images: SampleSize = 2000,
        batch_size: SampleSize = 128,
        align: bool = True,
        example_input: ImageShape | None = None,
        plot: bool = True,
        seed: Seed = 0,
    ) -> None:
        if scoring == "notebook":
            log.warning("scoring=notebook is now called scoring=uncalibrated")
            scoring = "uncalibrated"
        super().__init__(
            rule=_rule(interpolation, scoring, density, scale),
            align="weights" if align else None,
            head=head,
            # The notebook left the base's buffers alone.
            batch_norm="pretrained"
            if (batch_norm, scoring) == ("auto", "uncalibrated")
            else batch_norm,
            calibration_images=calibration_images,
            batch_size=batch_size,
            example_input=example_input,
            plot=plot,
            seed=seed,
        )
        self.top_p = top_p
        self.rank_by = rank_by
        self.weighting = weighting
        self.interpolation = interpolation
        self.scoring = scoring
        if not isinstance(weighting, str):
            self.weights = weighting
        self._snr = partial(layer_snr, sigma=sigma, threshold=threshold, alpha=alpha)
        self._records: list[LayerRecord] = []
        self._experts: tuple[str, ...] = ()

    # -- results for the user --------------------------------------------------------------------

    @property
    def layer_table(self) -> pd.DataFrame:
        """One row per layer in the order of the forward pass; the columns of ``layers.csv``."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for position, record in enumerate(self._records):
            row: dict[str, Any] = {
                "position": position,
                "layer": record.layer.name,
                "tensors": " ".join(record.layer.tensors),
                "shape": "x".join(map(str, record.shape)),
                "head": record.is_head,
            }
            row |= {f"snr/{name}": found.snr for name, found in record.snr.items()}
            row |= {f"signal_rank/{name}": found.signal_rank for name, found in record.snr.items()}
            row |= {
                "task_vector_snr": record.task_vector_snr,
                "similarity": record.similarity,
                "relative_change": record.relative_change,
                "score": record.score,
                "rank": record.rank,
                "selected": record.selected,
            }
            row |= {f"weight/{name}": record.weights.get(name) for name in self._experts}
            rows.append(row)
        return pd.DataFrame(rows)

    # -- the algorithm ---------------------------------------------------------------------------

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the pool can be merged with these options.

        Raises:
            UserError: the pool cannot be merged with these options.
        """
        super().check_pool(modelpool)
        if not isinstance(self.rank_by, str):
            self._check_names(self.rank_by, modelpool)
        if self.rank_by in ("similarity", "hybrid") and len(modelpool) < 2:
            raise UserError(f"rank_by={self.rank_by} compares experts, and the pool has only one")

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the base with the selected layers merged; nothing in the pool is changed."""
        result = super().run(modelpool)
        chosen = {r.layer.name: r.weights for r in self._records if r.selected}
        self.report.update(
            weights=chosen,
            candidate_layers=sum(not record.is_head for record in self._records),
        )
        if self.output_path is not None and self.fabric.is_global_zero:
            from fusion.figures.layers import layer_snr_figure
            from fusion.figures.style import save_figure

            table = self.layer_table
            write_text(self.output_path / "layers.csv", table.to_csv(index=False))
            if self.plot:
                save_figure(layer_snr_figure(table), self.output_path, "layers")
        return result

    def prepared(self, members: Members) -> Members:
        """Return the members; under uncalibrated scoring every norm is a separate layer."""
        return dataclasses.replace(members, layers=self._layers(members.layers, members.network))

    def choose(self, members: Members, plan: HeadPlan) -> LayerChoice:
        """Score the layers, select the best, and weigh the experts in each of them."""
        self._experts = members.names
        scorer = LayerScorer(
            None if self.scoring == "uncalibrated" else self._snr,
            with_task_vectors=self.rank_by == "task_vector",
            device=exact_device(self.fabric.device),
            progress=self.progress,
        )
        self._records = scorer.score(members, with_head=plan.head_is_a_layer)
        for record in self._records:
            record.weights = self._weights(record)
        self._select()
        return LayerChoice(
            {r.layer.name: tuple(r.weights.values()) for r in self._records if r.selected}
        )

    def finish(self, members: Members, result: nn.Module) -> None:
        """Measure the consistency of the result with its experts."""
        merged = [key for r in self._records if r.selected for key in r.layer.tensors]
        with self.profile("consistency"):
            write_consistency(self, result, members, merged_tensors=merged)

    def _layers(self, layers: Sequence[Layer], model: nn.Module) -> tuple[Layer, ...]:
        split = self.scoring == "uncalibrated"
        return notebook.split_norms(layers, model) if split else tuple(layers)

    def _check_names(self, names: Sequence[str], modelpool: BaseModelPool) -> None:
        """Check that the layers named in ``rank_by`` exist and can be merged."""
        model = modelpool.architecture(PRETRAINED)
        layers = {layer.name: layer for layer in self._layers(layers_of(model, modelpool), model)}
        plan = plan_heads(modelpool, self.head)
        for name in names:
            if name not in layers:
                raise UserError(
                    f"rank_by: the network has no layer '{name}'{suggestion(name, layers)}"
                )
            if not plan.head_is_a_layer and set(modelpool.head.tensors) & set(layers[name].tensors):
                raise UserError(
                    f"rank_by: '{name}' is the head, and the members' heads stand for different "
                    f"classes; it is no layer to merge (see the option 'head')"
                )

    def _weights(self, record: LayerRecord) -> dict[str, float]:
        if self.weighting == "snr":
            return scores.shares({name: record.snr[name].snr for name in self._experts})
        shares = self.shares(self._experts)
        return dict(zip(self._experts, shares, strict=True))

    def _select(self) -> None:
        if not isinstance(self.rank_by, str):
            scores.select_named(self._records, self.rank_by)
            return
        scores.score_layers(
            self._records, self.rank_by, base=PRETRAINED, experts=self._experts, seed=self.seed
        )
        if self.scoring == "uncalibrated":
            scores.select_top_ascending(self._records, self.top_p)
        else:
            scores.select_top(self._records, self.top_p)


def _rule(interpolation: str, scoring: str, density: float | None, scale: float | None) -> Rule:
    """Return the rule that the options name.

    Raises:
        UserError: an option that this rule does not have.
    """
    without_options = interpolation != "ties" or scoring == "uncalibrated"
    for option, value in (("density", density), ("scale", scale)):
        if without_options and value is not None:
            raise UserError(
                f"{option} is an option of interpolation=ties with scoring=calibrated, and was "
                f"given with interpolation={interpolation}, scoring={scoring}; leave it out"
            )
    if interpolation == "lerp":
        return Mean()
    if interpolation == "slerp":
        return Slerp()
    if scoring == "uncalibrated":
        return notebook.NotebookTies()
    return Ties(
        density=0.2 if density is None else density,
        scale=1.0 if scale is None else scale,
        scope="tensor",
    )
