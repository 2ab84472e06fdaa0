"""Merge the layers whose weights stand out from noise; leave the rest as the base had them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusion.errors import UserError, suggestion
from fusion.files import write_text
from fusion.method import batch_norm as bn
from fusion.method import head as heads
from fusion.method import layer_scores as scores
from fusion.method import notebook
from fusion.method.aligned import align_experts, check_alignable, keep_alignment
from fusion.method.base import BaseAlgorithm
from fusion.method.batch_norm import working
from fusion.method.choice import check_choice
from fusion.method.consistency import keep_consistency
from fusion.method.layer_scores import LayerRecord
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.models import Layer, find_layers, head_names
from fusion.spectrum import layer_snr
from fusion.spectrum.noise_model import SigmaRule, ThresholdRule
from fusion.weights import TensorSource, spherical_mean, ties, weighted_mean

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

WEIGHTINGS = ("snr", "equal")
INTERPOLATIONS = ("lerp", "slerp", "ties")
SCORINGS = ("calibrated", "notebook")
HEADS = ("pretrained", "union")
_HEAD_WORDS = {"pretrained": "kept as the base has it", "union": "the union of the experts' rows"}


class SNRSelectiveMerge(BaseAlgorithm):
    """Merge experts into their base, layer-selectively by signal-to-noise ratio.

    A layer is a convolution or linear module with all its parameters and the normalisation that
    follows it. Every layer is scored in every member by the singular values of its weight against
    the noise that random-matrix theory predicts (:func:`fusion.spectrum.layer_snr`; after
    "Spectrum", arXiv 2406.06623). The top ceil(top_p·L) layers become a mean of the experts', all
    others stay the base's.

    After ``run``, ``selected_layers`` and ``layer_table`` tell what was merged; with an
    ``output_path`` the table is in ``layers.csv`` and drawn in ``layers.pdf`` and ``.png``.

    Args:
        top_p: share of the layers that is merged, in [0, 1].
        rank_by: ``pretrained`` (the base's SNR), ``experts`` (mean of the experts'),
            ``task_vector`` (mean SNR of expert − base), ``similarity`` (mean cosine of the experts'
            changes), ``hybrid`` (SNR and 1.7 × similarity, each scaled to [0, 1]), ``norm``
            (relative size of the changes), ``random`` (seeded: the control), or a list of layer
            names, which are merged whatever ``top_p`` says.
        weighting: shares of the experts in each layer: ``snr`` (in proportion to their SNR, equal
            where all are 0), ``equal``, or one number per expert as a list or by name.
        interpolation: ``lerp`` (weighted mean), ``slerp`` (on the sphere), ``ties``.
        scoring: ``calibrated``, or ``notebook`` (the formula without the factor √b, norm layers
            ranked by themselves; kept for comparison only).
        batch_norm: running statistics: ``pretrained`` (kept), ``merge`` (those of the mixture, in
            merged layers), ``recalibrate`` (measured anew on a shuffled sample of the pool's
            training data), ``auto`` (recalibrate where the pool has data, else merge).
        head: tensors whose shape differs between members: ``pretrained`` keeps the base's,
            ``union`` assembles the experts' rows by the original labels of their classes.
        sigma, threshold, alpha: of the noise model, see :func:`fusion.spectrum.layer_snr`.
        density: of TIES: the share of each change that is kept, in (0, 1].
        scale: of TIES: the factor λ of the merged change.
        calibration_images: how many images ``recalibrate`` looks at, at most.
        batch_size: images per forward pass of the recalibration.
        align: first bring the experts' units into the base's order (:func:`fusion.alignment.align`;
            of experts fine-tuned from the base usually nothing moves, and the report says so).
            A network whose symmetries cannot be found is an error: nothing is skipped silently.
        example_input: shape of one image, (C, H, W), for ``align``; by default the pool's first
            training image, or else a guess from the first convolution.
        plot: whether to draw the figures.
        seed: of the random ranking and the calibration sample.

    Raises:
        UserError: an option that has no meaning.
    """

    def __init__(
        self,
        *,
        top_p: float = 0.1,
        rank_by: str | Sequence[str] = "experts",
        weighting: str | Sequence[float] | Mapping[str, float] = "snr",
        interpolation: str = "lerp",
        scoring: str = "calibrated",
        batch_norm: str = "auto",
        head: str = "pretrained",
        sigma: SigmaRule = "median",
        threshold: ThresholdRule = "tracy_widom",
        alpha: float = 0.01,
        density: float = 0.2,
        scale: float = 1.0,
        calibration_images: int = 2000,
        batch_size: int = 128,
        align: bool = True,
        example_input: Sequence[int] | None = None,
        plot: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 <= top_p <= 1:
            raise UserError(f"top_p is {top_p}; it is a share of the layers, between 0 and 1")
        if isinstance(rank_by, str):
            check_choice("rank_by", rank_by, scores.RANKINGS)
        if isinstance(weighting, str):
            check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("interpolation", interpolation, INTERPOLATIONS)
        check_choice("scoring", scoring, SCORINGS)
        check_choice("batch_norm", batch_norm, bn.TREATMENTS)
        check_choice("head", head, HEADS)
        if not 0 < density <= 1:
            raise UserError(f"density is {density}; it is the share that is kept, in (0, 1]")
        bn.check_sample(calibration_images, batch_size)
        self.top_p = top_p
        self.rank_by = rank_by
        self.weighting = weighting
        self.interpolation = interpolation
        self.scoring = scoring
        self.batch_norm = batch_norm
        self.head = head
        self.density = density
        self.scale = scale
        self.calibration_images = calibration_images
        self.batch_size = batch_size
        self.align = align
        self.example_input = example_input
        self.plot = plot
        self.seed = seed
        self._snr = partial(layer_snr, sigma=sigma, threshold=threshold, alpha=alpha)
        self._snr(torch.eye(4))  # a misspelt estimator is told now, not after training the experts
        self._records: list[LayerRecord] = []
        self._experts: list[str] = []
        self._labels: tuple[int, ...] | None = None

    # -- what a user looks at --------------------------------------------------------------------

    @property
    def selected_layers(self) -> list[str]:
        """The names of the merged layers, in the order of the forward pass."""
        return [record.layer.name for record in self._records if record.selected]

    @property
    def layer_table(self) -> pd.DataFrame:
        """A row a layer in the order of the forward pass; the columns of ``layers.csv``."""
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
            UserError: says what is wrong and the cure.
        """
        if not modelpool.has_pretrained or not len(modelpool):
            raise UserError(
                f"{type(self).__name__} needs a base and at least one expert; the pool has "
                f"{', '.join(modelpool.all_model_names) or 'nothing'}; add '{PRETRAINED}' and more"
            )
        modelpool.preflight()
        model = modelpool.architecture(PRETRAINED)
        if not isinstance(self.rank_by, str):
            self._check_names(self.rank_by, model, modelpool)
        if self.rank_by in ("similarity", "hybrid") and len(modelpool) < 2:
            raise UserError(f"rank_by={self.rank_by} compares experts, and the pool has only one")
        if not isinstance(self.weighting, str):
            self._given_weights(modelpool.model_names)
        if self.head == "union":
            heads.check_union(modelpool)
        if self.align:
            try:
                check_alignable(modelpool, self.example_input)
            except UserError as error:
                raise UserError(f"{error}; or merge without alignment: align=false") from error
        bn.chosen_treatment(self._batch_norm, modelpool, model)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the base with the selected layers merged; nothing in the pool is changed."""
        self._experts = modelpool.model_names
        with self.profile("load members"):
            model = modelpool.load_pretrained_model()
            base = model.state_dict()
            experts = {name: modelpool.tensors(name) for name in self._experts}
        if self.align:
            with self.profile("align experts"):
                experts, records = align_experts(
                    self, modelpool, model, self._experts, shape=self.example_input, seed=self.seed
                )
                keep_alignment(self, records, plot=self.plot)
        with self.profile("score layers"):
            self._records = self._score(model, base, experts)
            self._select()
        treatment = bn.chosen_treatment(self._batch_norm, modelpool, model)
        with self.profile("merge layers"):
            merged = self._merge(model, base, experts)
            statistics = (
                self._merge_statistics(model, base, experts) if treatment == "merge" else {}
            )
            merged |= statistics
            self._labels = modelpool.classes(PRETRAINED)
            if self.head == "union":
                self._labels = heads.unite(merged, base, experts, modelpool)
            result = copy.deepcopy(model)
            heads.resize(result, merged)
            result.load_state_dict(merged)
        with self.profile("batch norm"):
            self._treat_batch_norm(treatment, result, model, statistics, modelpool)
        with self.profile("consistency"):
            merged_tensors = [key for r in self._records if r.selected for key in r.layer.tensors]
            keep_consistency(self, result, experts, merged_tensors=merged_tensors)
        self._tell(treatment)
        return result

    def result_classes(self, modelpool: BaseModelPool) -> tuple[int, ...] | None:
        """Return the original labels of the result's outputs."""
        del modelpool
        return self._labels

    def _layers(self, model: nn.Module) -> tuple[Layer, ...]:
        layers = find_layers(model)
        return notebook.split_norms(layers, model) if self.scoring == "notebook" else layers

    def _check_names(
        self, names: Sequence[str], model: nn.Module, modelpool: BaseModelPool
    ) -> None:
        """Check that the layers named in ``rank_by`` are there and can be merged."""
        layers = {layer.name: layer for layer in self._layers(model)}
        heads_of = [head_names(model, modelpool.architecture(name)) for name in modelpool]
        head = {key for keys in heads_of for key in keys}
        for name in names:
            if name not in layers:
                raise UserError(
                    f"rank_by: the network has no layer '{name}'{suggestion(name, layers)}"
                )
            if head & set(layers[name].tensors):
                raise UserError(
                    f"rank_by: '{name}' is the head, whose shape differs between the members; it "
                    f"is no layer to merge (see the option 'head')"
                )

    def _score(
        self, model: nn.Module, base: Mapping[str, Tensor], experts: Mapping[str, TensorSource]
    ) -> list[LayerRecord]:
        records = []
        layers = self._layers(model)
        for layer in tqdm(layers, desc="Scoring layers", unit="layer", disable=self._no_bar):
            record = LayerRecord(layer, tuple(base[layer.weight].shape))
            record.is_head = any(
                source.info(key).shape != tuple(base[key].shape)
                for source in experts.values()
                for key in layer.tensors
                if base[key].is_floating_point()
            )
            for name, member in {PRETRAINED: base, **experts}.items():
                record.snr[name] = self._score_weight(member[layer.weight], record)
            if not record.is_head:
                self._compare(record, model, base, experts)
            record.weights = self._weights(record)
            records.append(record)
        return records

    def _score_weight(self, weight: Tensor, record: LayerRecord) -> Any:
        weight = weight.to(self.fabric.device)
        if self.scoring == "notebook":
            return notebook.score(weight)
        matrix = scores.weight_matrix(weight, record.layer)
        return self._snr(matrix, groups=record.layer.groups)

    def _compare(
        self,
        record: LayerRecord,
        model: nn.Module,
        base: Mapping[str, Tensor],
        experts: Mapping[str, TensorSource],
    ) -> None:
        """Compare the experts' changes to one layer: direction, size, and SNR if ranked by it."""
        keys = _parameters(record, model)
        vectors = [
            torch.cat([member[key].to(self.fabric.device, torch.float64).flatten() for key in keys])
            for member in (base, *experts.values())
        ]
        record.similarity, record.relative_change = scores.change_statistics(
            vectors[0], vectors[1:]
        )
        if self.rank_by == "task_vector":
            key = record.layer.weight
            found = [
                self._score_weight(source[key].double() - base[key].double(), record).snr
                for source in experts.values()
            ]
            record.task_vector_snr = sum(found) / len(found)

    def _weights(self, record: LayerRecord) -> dict[str, float]:
        if self.weighting == "snr":
            return scores.shares({name: record.snr[name].snr for name in self._experts})
        if self.weighting == "equal":
            return scores.shares(dict.fromkeys(self._experts, 1.0))
        return self._given_weights(self._experts)

    def _given_weights(self, experts: Sequence[str]) -> dict[str, float]:
        given = self.weighting
        assert not isinstance(given, str)
        if not isinstance(given, Mapping):
            if len(given) != len(experts):
                raise UserError(
                    f"weighting: {len(given)} numbers for {len(experts)} experts "
                    f"({', '.join(experts)}); give one for each"
                )
            given = dict(zip(experts, given, strict=True))
        if set(given) != set(experts):
            raise UserError(
                f"weighting names {', '.join(given)}; the experts are {', '.join(experts)}"
            )
        numbers = all(isinstance(w, Real) and 0 <= w < math.inf for w in given.values())
        if not numbers or not sum(given.values()) > 0:
            raise UserError(f"weighting: {dict(given)} are no shares; give numbers of 0 or more")
        return scores.shares({name: float(given[name]) for name in experts})

    def _select(self) -> None:
        if not isinstance(self.rank_by, str):
            scores.select_named(self._records, self.rank_by)
            return
        scores.score_layers(
            self._records, self.rank_by, base=PRETRAINED, experts=self._experts, seed=self.seed
        )
        if self.scoring == "notebook":
            scores.select_top_ascending(self._records, self.top_p)
        else:
            scores.select_top(self._records, self.top_p)

    def _merge(
        self, model: nn.Module, base: Mapping[str, Tensor], experts: Mapping[str, TensorSource]
    ) -> dict[str, Tensor]:
        """Return the base's state with the selected layers' parameters merged."""
        merged = dict(base)
        for record in self._records:
            if record.selected:
                for key in _parameters(record, model):
                    tensors = [working(source[key]) for source in experts.values()]
                    value = self._interpolate(base[key], tensors, list(record.weights.values()))
                    merged[key] = value.to(base[key].dtype)
        return merged

    def _merge_statistics(
        self, model: nn.Module, base: Mapping[str, Tensor], experts: Mapping[str, TensorSource]
    ) -> dict[str, Tensor]:
        """Return the mixture's running statistics in the selected layers."""
        merged: dict[str, Tensor] = {}
        for record in self._records:
            if record.selected:
                for keys in bn.statistics_keys(model, record.layer.norms):
                    members, weights = list(experts.values()), list(record.weights.values())
                    merged |= bn.merged_statistics(base, keys, members, weights)
        return merged

    def _interpolate(self, base: Tensor, tensors: list[Tensor], weights: list[float]) -> Tensor:
        if self.interpolation == "lerp":
            return weighted_mean(tensors, weights)
        if self.interpolation == "slerp":
            return spherical_mean(tensors, weights)
        density = notebook.TIES_DENSITY if self.scoring == "notebook" else self.density
        return ties(base, tensors, weights, density=density, scale=self.scale)

    def _treat_batch_norm(
        self,
        treatment: str,
        result: nn.Module,
        base: nn.Module,
        statistics: Mapping[str, Tensor],
        modelpool: BaseModelPool,
    ) -> None:
        """Treat the result's running statistics; the base treated alike is the control."""
        recalibrate = partial(
            bn.recalibrate,
            modelpool=modelpool,
            fabric=self.fabric,
            images=self.calibration_images,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        if treatment == "recalibrate":
            recalibrate(result)
            self.references[f"{PRETRAINED}, batch norm recalibrated"] = partial(recalibrate, base)
        elif treatment == "merge":
            base.load_state_dict({**base.state_dict(), **statistics})
            self.references[f"{PRETRAINED}, batch norm merged"] = lambda: base
        else:
            self.references[PRETRAINED] = lambda: base

    def _tell(self, treatment: str) -> None:
        head = [key for r in self._records if r.is_head for key in r.layer.tensors]
        candidates = sum(not record.is_head for record in self._records)
        chosen = self.selected_layers
        log.info(
            "Merged %d of %d layers by %s: %s",
            len(chosen),
            candidates,
            self.interpolation,
            _some(chosen) or "none",
        )
        if head:
            log.info("Head, %s: %s", _HEAD_WORDS[self.head], ", ".join(head))
        log.info("Batch norm: %s", treatment)
        self.report.update(
            selected_layers=chosen,
            candidate_layers=candidates,
            head_tensors=head,
            head=self.head,
            batch_norm=treatment,
            weights={r.layer.name: r.weights for r in self._records if r.selected},
        )
        if self.output_path is not None and self.fabric.is_global_zero:
            from fusion.figures.layers import layer_snr_figure
            from fusion.figures.style import save_figure

            table = self.layer_table
            write_text(self.output_path / "layers.csv", table.to_csv(index=False))
            if self.plot:
                save_figure(layer_snr_figure(table), self.output_path, "layers")

    @property
    def _no_bar(self) -> bool | None:
        """Tell tqdm: None means no bar without a terminal."""
        return None if self.progress is None else not self.progress

    @property
    def _batch_norm(self) -> str:
        """The treatment asked for; the notebook left the base's buffers alone."""
        unsaid = self.batch_norm == "auto" and self.scoring == "notebook"
        return "pretrained" if unsaid else self.batch_norm


def _parameters(record: LayerRecord, model: nn.Module) -> list[str]:
    """Return the layer's floating tensors but for batch norm's running statistics."""
    statistics = {key for keys in bn.statistics_keys(model, record.layer.norms) for key in keys}
    state = model.state_dict()
    return [
        key
        for key in record.layer.tensors
        if key not in statistics and state[key].is_floating_point()
    ]


def _some(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
