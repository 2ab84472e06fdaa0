"""The one pipeline of all merges: align, choose layers, rule, heads, batch norm, controls."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusion.errors import UserError, check_choice
from fusion.labels import LabelSpace
from fusion.merging import batch_norm as bn
from fusion.merging.alignment import ALIGNMENTS, AlignmentStage
from fusion.merging.heads import HEADS, HeadPlan, merged_heads, plan_heads, task_labels
from fusion.merging.members import LayerChoice, Members, every_layer
from fusion.merging.rule import Need, Rule
from fusion.merging.tensors import merge_parameters, merge_statistics
from fusion.method.alignment_report import write_alignment
from fusion.method.base import BaseAlgorithm
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.models import MultiTaskNetwork, resize_head
from fusion.weights import normalised_weights

log = logging.getLogger(__name__)

_CONTROL = {
    "pretrained": "",
    "merge": ", batch norm merged",
    "interpolate": ", batch norm interpolated",
    "recalibrate": ", batch norm recalibrated",
    "recalibrate_per_task": ", batch norm recalibrated per task",
    "repair": ", repaired",
}
_HEAD_WORDS = {
    "merged": "merged like any layer",
    "pretrained": "kept as the base has it",
    "union": "the union of the experts' rows",
    "tasks": "one for each task",
}


class Merge(BaseAlgorithm):
    """Merge experts tensor by tensor with a rule.

    The stages, each with a default: align the experts' units, choose layers and the experts'
    shares, apply the rule to every parameter of these layers, decide about the heads, then about
    the running statistics of batch norm; and prepare the controls that the result is compared
    with. Integer buffers are copied; running statistics never pass through a rule.

    Args:
        rule: how one tensor is merged.
        weights: shares of the experts, one number per expert as a list or by name; equal ones by
            default.
        align: bring the experts' units into one order first: by ``weights``, by ``activations``
            on the pool's training images, or ``merge_many`` (by weights, to each other).
        head: ``auto`` (merged like any layer where all experts have the same classes; the base's
            where its classes cover theirs; else one head for each task), or ``pretrained``,
            ``union`` (the experts' rows, class by class), ``tasks``.
        batch_norm: running statistics: ``pretrained`` (kept), ``merge`` (those of the mixture of
            the experts' data), ``interpolate`` (their weighted mean), ``recalibrate`` (measured
            anew on a sample of the pool's training images, equally many of each expert's),
            ``recalibrate_per_task`` (a set for each task), ``repair`` (REPAIR: every channel's
            mean and deviation brought to the mean of the experts'), ``auto`` (recalibrate where
            the pool has images, else merge).
        calibration_images: how many images are looked at, at most.
        batch_size: images per forward pass.
        example_input: shape of one image, (C, H, W), for ``align``; by default the pool's first
            training image, or else a guess from the first convolution.
        plot: whether to draw the figures.
        seed: of everything random: masks, the order of the alignment, the sample of images.

    Raises:
        UserError: an option that has no meaning.
    """

    without_images: ClassVar[str] = "merge"
    """What ``batch_norm=auto`` stands for in a pool without training images."""

    def __init__(
        self,
        *,
        rule: Rule,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        align: str | None = None,
        head: str = "auto",
        batch_norm: str = "auto",
        calibration_images: int = 2000,
        batch_size: int = 128,
        example_input: Sequence[int] | None = None,
        plot: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(rule, Rule):
            raise UserError(
                f"rule must be a fusion.merging.Rule, not a {type(rule).__name__}; name its class "
                f"as method.rule._target_"
            )
        check_choice("head", head, HEADS)
        check_choice("batch_norm", batch_norm, bn.TREATMENTS)
        if align is not None:
            check_choice("align", align, ALIGNMENTS)
        self.rule = rule
        self.weights = weights
        self.head = head
        self.batch_norm = batch_norm
        self.calibration = bn.Calibration(calibration_images, batch_size, seed)
        self.alignment = (
            None
            if align is None
            else AlignmentStage(align, example_input, seed, self.calibration)
        )
        self.plot = plot
        self.seed = seed
        self._selected: list[str] = []
        self._labels: LabelSpace | None = None

    # -- what a subclass may change ----------------------------------------------------------------

    def choose(self, members: Members, plan: HeadPlan) -> LayerChoice:
        """Return which layers are merged, and how much of each expert goes into them.

        Args:
            members: base and experts, aligned.
            plan: what becomes of the heads.
        """
        del plan
        return every_layer(members, self.shares(members.names))

    def prepared(self, members: Members) -> Members:
        """Return the members as they are to be merged; as they are by default."""
        return members

    def finish(self, members: Members, result: nn.Module) -> None:
        """Look at the result once it is made; nothing by default."""

    # -- the pipeline ------------------------------------------------------------------------------

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the pool can be merged with these options.

        Raises:
            UserError: says what is wrong and the cure.
        """
        if not len(modelpool):
            raise UserError(
                f"{type(self).__name__} merges experts, and the pool has none (it has "
                f"{', '.join(modelpool.all_model_names) or 'nothing'}); add at least one"
            )
        if Need.BASE in self.rule.needs and not modelpool.has_pretrained:
            raise UserError(
                f"{type(self.rule).__name__} needs a base, and the pool has only "
                f"{', '.join(modelpool.all_model_names)}; add a member named '{PRETRAINED}'"
            )
        modelpool.preflight()
        self.shares(modelpool.model_names)
        plan = plan_heads(modelpool, self.head)
        model = modelpool.architecture(modelpool.pretrained_or_first_name)
        if self.alignment is not None:
            try:
                self.alignment.check(modelpool)
            except UserError as error:
                raise UserError(f"{error}; or merge without alignment: align=null") from error
        self._treatment(modelpool, model)
        if plan.kind == "tasks":
            task_labels(plan, modelpool)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the merged network; nothing in the pool is changed."""
        with self.profile("load members"):
            members = Members.read(modelpool)
        plan = plan_heads(modelpool, self.head)
        unaligned = members
        if self.alignment is not None:
            with self.profile("align experts"):
                members, records = self.alignment.run(
                    members, modelpool, device=self.fabric.device
                )
            write_alignment(self, records, plot=self.plot)
        members = self.prepared(members)
        with self.profile("choose layers"):
            choice = self.choose(members, plan)
        treatment = self._treatment(modelpool, members.network)
        result = self._merged(members, choice, plan, treatment, modelpool)
        self._selected = [layer.name for layer in members.layers if layer.name in choice]
        self._labels = None if isinstance(result, MultiTaskNetwork) else plan.labels
        self.add_controls(members, unaligned, choice, plan, treatment, modelpool)
        self._report(members, plan, treatment, result)
        self.finish(members, result)
        return result

    def add_controls(
        self,
        members: Members,
        unaligned: Members,
        choice: LayerChoice,
        plan: HeadPlan,
        treatment: str,
        modelpool: BaseModelPool,
    ) -> None:
        """Name the networks that the result is compared with.

        By default the base with the same batch norm; where there is one head for each task, with
        the experts' heads.
        """
        del unaligned
        if members.base is None:
            return
        heads = merged_heads(plan, members.head, members.base, members.experts, modelpool)
        own_heads = plan.kind in ("tasks", "merged") and bool(heads)
        name = f"{PRETRAINED}{', experts' heads' if own_heads else ''}{_CONTROL[treatment]}"
        self.controls[name] = partial(
            self._finished,
            members,
            choice,
            {},
            heads if own_heads else {},
            plan,
            treatment,
            modelpool,
        )
        if not own_heads:
            self.record.labels[name] = modelpool.labels(PRETRAINED)

    @property
    def selected_layers(self) -> list[str]:
        """The names of the merged layers, in the order of the forward pass."""
        return self._selected

    def result_labels(self, modelpool: BaseModelPool) -> LabelSpace | None:
        """Return the classes of the result's outputs; a result of several tasks has its own."""
        del modelpool
        return self._labels

    def shares(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the experts' shares as given by ``weights``, summing to 1.

        Raises:
            UserError: they do not fit the experts.
        """
        given = self.weights
        if isinstance(given, Mapping):
            if set(given) != set(names):
                raise UserError(
                    f"weights names {', '.join(given)}; the experts are {', '.join(names)}"
                )
            given = [given[name] for name in names]
        if given is not None and len(given) != len(names):
            raise UserError(
                f"weights: {len(given)} numbers for {len(names)} experts ({', '.join(names)}); "
                f"give one for each"
            )
        return tuple(normalised_weights(given, len(names)))

    def _treatment(self, modelpool: BaseModelPool, model: nn.Module) -> str:
        return bn.chosen_treatment(
            self.batch_norm, modelpool, model, without_images=self.without_images
        )

    def _merged(
        self,
        members: Members,
        choice: LayerChoice,
        plan: HeadPlan,
        treatment: str,
        modelpool: BaseModelPool,
    ) -> nn.Module:
        with self.profile("merge layers"):
            state = merge_parameters(
                members,
                choice,
                self.rule,
                with_head=plan.kind == "merged" and (plan.base_shares or members.base is None),
                device=self.fabric.device,
                seed=self.seed,
            )
            heads = merged_heads(plan, members.head, members.base, members.experts, modelpool)
        return self._finished(members, choice, state, heads, plan, treatment, modelpool)

    def _finished(
        self,
        members: Members,
        choice: LayerChoice,
        state: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
        plan: HeadPlan,
        treatment: str,
        modelpool: BaseModelPool,
    ) -> nn.Module:
        """Return the network of merged parameters and heads, with its batch norm treated.

        Args:
            members: what was merged.
            choice: the merged layers, whose statistics are merged too where asked for.
            state: merged parameters; what is missing is the base's.
            heads: task → head, or ``""`` → the only head.
            plan: what becomes of the heads.
            treatment: of batch norm.
            modelpool: has the images.
        """
        body = copy.deepcopy(members.network)
        state = dict(state)
        if treatment in ("merge", "interpolate"):
            state |= merge_statistics(members, choice, treatment)
        if plan.kind != "tasks":
            state |= heads.get("", {})
        resize_head(body, state)
        current = body.state_dict()
        with torch.no_grad():
            for key, tensor in state.items():
                current[key].copy_(tensor)
        with self.profile("batch norm"):
            return self._treated(body, heads, plan, treatment, members, modelpool)

    def _treated(
        self,
        body: nn.Module,
        heads: Mapping[str, Mapping[str, Tensor]],
        plan: HeadPlan,
        treatment: str,
        members: Members,
        modelpool: BaseModelPool,
    ) -> nn.Module:
        """Treat the running statistics, and put heads of several tasks onto the body."""
        recalibrate = partial(
            bn.recalibrate,
            modelpool=modelpool,
            fabric=self.fabric,
            calibration=self.calibration,
        )
        if treatment == "recalibrate":
            recalibrate(body)
        elif treatment == "repair":
            experts = [modelpool.load_model(name) for name in members.names]
            for expert, name in zip(experts, members.names, strict=True):
                expert.load_state_dict(dict(members.experts[name]))
            bn.repair_mean(
                body,
                experts,
                modelpool,
                self.fabric,
                self.calibration,
                weights=self.shares(members.names),
            )
        per_task = treatment == "recalibrate_per_task"
        if plan.kind != "tasks" and not per_task:
            return body
        own: dict[str, dict[str, Tensor]] = {}
        by_head: dict[int, dict[str, Tensor]] = {}
        statistics = _statistics(body) if per_task else {}
        for task in modelpool.tasks:
            head = dict(heads.get(task, {}))
            if per_task:
                own[task] = {**head, **{k: t.clone() for k, t in statistics.items()}}
            else:  # tasks that share a head share one mapping
                own[task] = by_head.setdefault(id(heads.get(task)), head)
        network = MultiTaskNetwork.assemble(body, own, task_labels(plan, modelpool))
        in_head = [m.rpartition(".")[0] for m, _ in bn.statistics_keys(body) if m in members.head]
        for task, names in modelpool.tasks.items():
            if per_task:
                recalibrate(network.for_task(task), names=names)
            elif treatment == "recalibrate" and in_head:
                recalibrate(network.for_task(task), names=names, norms=in_head)
        return network

    def _report(
        self, members: Members, plan: HeadPlan, treatment: str, result: nn.Module
    ) -> None:
        log.info(
            "Merged %d experts in %d of %d layers by %s",
            len(members.names),
            len(self._selected),
            len(members.layers),
            type(self.rule).__name__,
        )
        log.info("Head, %s: %s", _HEAD_WORDS[plan.kind], ", ".join(members.head.tensors))
        if isinstance(result, MultiTaskNetwork):
            log.info("Tasks: %s", ", ".join(result.tasks))
        log.info("Batch norm: %s", treatment)
        self.report.update(
            experts=list(members.names),
            selected_layers=self._selected,
            candidate_layers=len(members.layers),
            head=plan.kind,
            head_tensors=list(members.head.tensors),
            tasks=list(result.tasks) if isinstance(result, MultiTaskNetwork) else None,
            batch_norm=treatment,
        )


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of all norms, with their counters of batches."""
    state = model.state_dict()
    keys = [key for pair in bn.statistics_keys(model) for key in pair]
    counters = [f"{key.rpartition('.')[0]}.num_batches_tracked" for key in keys[::2]]
    return {key: state[key] for key in [*keys, *counters] if key in state}
