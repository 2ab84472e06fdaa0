"""The pipeline of all merges: align, choose layers, rule, heads, batch norm, controls."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fusion.errors import NotApplicableError, UserError
from fusion.files import MODEL
from fusion.labels import LabelSpace
from fusion.merging import batch_norm as bn
from fusion.merging.alignment import AlignBy, AlignmentStage
from fusion.merging.assembly import Assembly
from fusion.merging.heads import HeadChoice, HeadPlan, plan_heads
from fusion.merging.joint_head import head_layer, joint_head
from fusion.merging.members import LayerChoice, Members, every_layer, layers_of
from fusion.merging.row_scale import with_rows_of_base
from fusion.merging.rule import Need, Rule, TaskRule
from fusion.merging.sequential import merge_in_stages
from fusion.merging.statistics import Statistics, check_statistics, gather
from fusion.merging.stored_network import write_network
from fusion.merging.streamable import STREAMED_FROM, obstacles_to_streaming, stored_bytes
from fusion.merging.tensors import merge_parameters, separate_parameters
from fusion.method.alignment_report import write_alignment
from fusion.method.base import BaseAlgorithm, ResultFile
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.modelpool.soundness import require_mergeable
from fusion.models import Layer, MultiTaskNetwork
from fusion.models.forward_pass import is_traceable
from fusion.options import Count, FilePath, ImageShape, SampleSize, Seed, checked
from fusion.weights import exact_device, normalised_weights

log = logging.getLogger(__name__)

_CONTROL = {
    "pretrained": "",
    "merge": ", batch norm merged",
    "interpolate": ", batch norm interpolated",
    "grams": ", batch norm from Gram matrices",
    "recalibrate": ", batch norm recalibrated",
    "recalibrate_per_task": ", batch norm recalibrated per task",
    "repair": ", repaired",
}
_FOR_TREATMENT = frozenset({"gram", "moments"})  # statistics for batch_norm=grams
_FOR_JOINT_HEAD = frozenset({"gram", "classes"})  # statistics for head=joint
_HEAD_WORDS = {
    "merged": "merged like any layer",
    "pretrained": "kept as the base has it",
    "union": "the union of the experts' rows",
    "joint": "solved for all classes together",
    "tasks": "one for each task",
}


class Merge(BaseAlgorithm):
    """Merge experts tensor by tensor with a rule.

    The stages, each with a default: align the experts' units, choose layers and the experts'
    shares, measure the statistics of the experts' data that the rule requests, apply the rule to
    every parameter of these layers, merge the heads, then the running statistics of batch norm, and
    prepare the controls with which the result is compared. Integer buffers are copied; running
    statistics never pass through a rule.

    Args:
        rule: how one tensor is merged.
        weights: shares of the experts, one number per expert as a list or by name; equal ones by
            default.
        align: bring the experts' units into one order first: by ``weights``, by ``activations``
            on the pool's training images, or ``merge_many`` (by weights, to each other).
        normalise_rows: first scale the experts' kernels to the row norms of the base wherever batch
            norm follows, which changes no function; see
            :func:`fusion.merging.row_scale.with_rows_of_base`.
        head: ``auto`` (merged like any layer where all experts have the same classes; the base's
            where its classes cover theirs; else one head for each task), or ``pretrained``,
            ``union`` (the experts' rows, class by class), ``joint`` (one head for all classes, by
            least squares from the features that each expert's head receives of each class: the
            labelled training images, or cards), ``tasks``.
        batch_norm: running statistics: ``pretrained`` (kept), ``merge`` (those of the mixture of
            the experts' data), ``interpolate`` (their weighted mean), ``grams`` (those that the
            merged layers have on the inputs that each expert's layers receive, computed from their
            Gram matrices: training images, or cards), ``recalibrate`` (measured again on a sample
            of the pool's training images, equally many of each expert's), ``recalibrate_per_task``
            (one set per task), ``repair`` (REPAIR: every channel's mean and deviation brought to
            the mean of the experts'), ``auto`` (recalibrate where the pool has images, grams where
            it has cards, else merge).
        calibration_images: maximum number of images.
        batch_size: images per forward pass.
        statistics_images: maximum number of training images of each expert for a rule that measures
            the experts' data.
        cache_dir: folder in which these statistics are stored under a hash of weights, images and
            options, so that a sweep measures once; by default they stay in memory.
        example_input: shape of one image, (C, H, W), for ``align``; by default the pool's first
            training image, or else a guess from the first convolution.
        streamed: whether the result is merged from file to file, with memory for a few tensors, or
            parts of them, at a time, and returned mapped from its file. The result is the same, bit
            for bit. This requires members that are files, a rule that uses no images, no alignment,
            and a ``batch_norm`` of ``pretrained``, ``merge`` or ``interpolate``. ``auto`` does so
            for members of 256 MiB or more in total, where there is a file for the result: the
            run's, or ``merged.safetensors`` in ``output_path``. ``True`` always does, without such
            a file into a temporary one (in ``TMPDIR``) that is deleted with the network; a merge
            that cannot be streamed is an error then.
        plot: whether to draw the figures.
        seed: of everything random: masks, the order of the alignment, the sample of images.

    Raises:
        UserError: an invalid option.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Requirements of the method in addition to those of its rule."""
    without_images: ClassVar[str] = "merge"
    """The choice of ``batch_norm=auto`` in a pool without training images."""
    without_alignment: ClassVar[str] = "align=null"
    """The option that switches alignment off; empty where alignment is the method."""

    @checked
    def __init__(
        self,
        *,
        rule: Rule,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        align: AlignBy | None = None,
        normalise_rows: bool = False,
        head: HeadChoice = "auto",
        batch_norm: bn.Treatment = "auto",
        calibration_images: SampleSize = 2000,
        batch_size: SampleSize = 128,
        statistics_images: Count = 500,
        cache_dir: FilePath | None = None,
        example_input: ImageShape | None = None,
        streamed: bool | Literal["auto"] = "auto",
        plot: bool = True,
        seed: Seed = 0,
    ) -> None:
        self.rule = rule
        self.weights = weights
        self.streamed = streamed
        self.normalise_rows = normalise_rows
        self.head = head
        self.batch_norm = batch_norm
        self.calibration = bn.Calibration(calibration_images, batch_size, seed)
        self.sample = bn.Calibration(statistics_images, batch_size, seed)
        self.cache_dir = cache_dir
        self.alignment = (
            None if align is None else AlignmentStage(align, example_input, seed, self.calibration)
        )
        self.plot = plot
        self.seed = seed
        self._selected: list[str] = []
        self._labels: LabelSpace | None = None

    # -- what a subclass may change ----------------------------------------------------------------

    def choose(self, members: Members, plan: HeadPlan) -> LayerChoice:
        """Return the layers that are merged, with the share of each expert in them.

        Args:
            members: base and experts, aligned.
            plan: the plan of the heads.
        """
        del plan
        return every_layer(members, self.shares(members.names))

    def prepared(self, members: Members) -> Members:
        """Return the members as they are to be merged."""
        return with_rows_of_base(members) if self.normalise_rows else members

    def finish(self, members: Members, result: nn.Module) -> None:
        """Hook that receives the finished result; does nothing by default."""

    def add_controls(self, assembly: Assembly, unaligned: Members) -> None:
        """Name the networks with which the result is compared.

        By default the base with the same batch norm; where its head stands for other classes, with
        the experts' heads.

        Args:
            assembly: makes networks like the result.
            unaligned: the experts as they were.
        """
        del unaligned
        members, plan, modelpool = assembly.members, assembly.plan, assembly.modelpool
        if members.base is None:
            return
        heads = assembly.heads() if plan.kind in ("tasks", "merged", "joint") else {}
        of_experts = ", joint head" if plan.kind == "joint" else ", experts' heads"
        heads_of = of_experts if heads else ""
        name = f"{PRETRAINED}{heads_of}{_CONTROL[assembly.treatment]}"
        self.controls[name] = partial(assembly.network, {}, heads)
        if not heads:
            self.record.labels[name] = modelpool.labels(PRETRAINED)

    # -- the pipeline ------------------------------------------------------------------------------

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the pool can be merged with these options.

        Raises:
            UserError: the pool cannot be merged with these options.
        """
        if not len(modelpool):
            raise UserError(
                f"{type(self).__name__} merges experts, and the pool has none (it has "
                f"{', '.join(modelpool.all_model_names) or 'nothing'}); add at least one"
            )
        self._check_needs(modelpool)
        modelpool.preflight(values=False)
        for name, network in modelpool.distinct_architectures(modelpool.model_names):
            require_mergeable(name, network)
        self.shares(modelpool.model_names)
        plan = plan_heads(modelpool, self.head)
        model = modelpool.architecture(modelpool.pretrained_or_first_name)
        if plan.kind == "joint":
            check_statistics(modelpool, _FOR_JOINT_HEAD)
            if is_traceable(model):  # another one has to be built and run
                head_layer(model, layers_of(model, modelpool), modelpool.head)
        if self.alignment is not None:
            try:
                self.alignment.check(modelpool)
            except UserError as error:
                if not self.without_alignment:
                    raise
                raise UserError(
                    f"{error}; or merge without alignment: {self.without_alignment}"
                ) from error
        treatment = self._treatment(modelpool, model)
        if treatment == "grams":
            check_statistics(modelpool, _FOR_TREATMENT)
        self._check_order_of_cards(modelpool, plan, treatment)
        if not self._streams(modelpool):
            modelpool.preflight()

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the merged network; nothing in the pool is changed."""
        streams = self._streams(modelpool)
        with self.profile("load members"):
            members = Members.open(modelpool) if streams else Members.read(modelpool)
        plan = plan_heads(modelpool, self.head)
        if plan.assumed and self.head == "auto":
            log.info(
                "The classes of %s are unknown: taken to be those of members whose heads have "
                "the same shape (the pool's option 'classes' says otherwise)",
                ", ".join(plan.assumed),
            )
        unaligned = members
        if self.alignment is not None:
            with self.profile("align experts"):
                members, records = self.alignment.run(members, modelpool, device=self.fabric.device)
            write_alignment(self, records, plot=self.plot)
        members = self.prepared(members)
        with self.profile("choose layers"):
            choice = self.choose(members, plan)
        assembly = Assembly(
            members,
            choice,
            plan,
            self._treatment(modelpool, members.network),
            modelpool,
            self.fabric,
            self.calibration,
            self.shares(members.names),
        )
        assembly = self.measured(assembly)
        result = self._merged_to_file(assembly) if streams else self.merged(assembly)
        self._selected = [layer.name for layer in members.layers if layer.name in choice]
        self._labels = None if isinstance(result, MultiTaskNetwork) else plan.labels
        self.add_controls(assembly, unaligned)
        self._report(assembly, result)
        self.finish(members, result)
        return result

    def merged(self, assembly: Assembly) -> nn.Module:
        """Return the network that the rule merges from the assembly's members."""
        members, plan = assembly.members, assembly.plan
        if self.rule.folded:
            members = members.folded()
        options: dict[str, Any] = {
            "with_head": plan.head_is_a_layer,
            "device": exact_device(self.fabric.device),
            "seed": self.seed,
        }
        own: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Tensor] = {}
        if self.rule.sequential:
            with self.profile("merge layers"):
                state = merge_in_stages(
                    members,
                    assembly.choice,
                    self.rule,
                    assembly.modelpool,
                    treatment=assembly.treatment,
                    calibration=self.sample,
                    fabric=self.fabric,
                    **options,
                )
        elif isinstance(self.rule, TaskRule) and self.rule.per_task:
            with self.profile("merge layers"):
                own = separate_parameters(
                    members, assembly.choice, self.rule, assembly.modelpool.tasks, **options
                )
        else:
            found = self._statistics(members, assembly)
            with self.profile("merge layers"):
                state = merge_parameters(
                    members, assembly.choice, self.rule, statistics=found, **options
                )
        with self.profile("batch norm"):
            return assembly.network(state, assembly.heads(), own)

    def measured(self, assembly: Assembly) -> Assembly:
        """Return the assembly with the statistics for its running statistics and its head."""
        members, plan = assembly.members, assembly.plan
        if assembly.treatment == "grams":
            found = self._gathered(assembly, members, _FOR_TREATMENT, _merged_layers(assembly))
            assembly = replace(assembly, measured=found)
        if plan.kind == "joint":
            assert plan.labels is not None
            layer = head_layer(members.network, members.layers, members.head)
            found = self._gathered(assembly, members, _FOR_JOINT_HEAD, [layer])
            joint = joint_head(members, assembly.modelpool, found, plan.labels)
            assembly = replace(assembly, joint=joint)
        return assembly

    def _statistics(self, members: Members, assembly: Assembly) -> Statistics | None:
        """Return the statistics that the rule reads, for the layers that are merged."""
        if not self.rule.statistics:
            return None
        return self._gathered(assembly, members, self.rule.statistics, _merged_layers(assembly))

    def _gathered(
        self,
        assembly: Assembly,
        members: Members,
        names: frozenset[str],
        layers: Sequence[Layer],
    ) -> Statistics:
        with self.profile("measure the experts' data"):
            return gather(
                assembly.modelpool,
                members,
                names,
                layers=layers,
                calibration=self.sample,
                device=exact_device(self.fabric.device),
                cache_dir=self.cache_dir,
            )

    def _merged_to_file(self, assembly: Assembly) -> nn.Module:
        """Merge into the result's file, and return the network in it."""
        wanted = self._result_file()
        with ExitStack() as stack, self.profile("merge layers"):
            if wanted is None:  # the mapping outlives the name of the file
                folder = TemporaryDirectory(prefix="fusion-", ignore_cleanup_errors=True)
                wanted = ResultFile(Path(stack.enter_context(folder)) / MODEL)
            else:
                self.record.written = wanted.path
            log.info("Merging from file to file, into %s", wanted.path)
            return write_network(
                assembly,
                self.rule,
                wanted.path,
                metadata=wanted.metadata,
                device=exact_device(self.fabric.device),
                seed=self.seed,
            )

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

    def _result_file(self) -> ResultFile | None:
        if self.result_file is not None or self.output_path is None:
            return self.result_file
        return ResultFile(self.output_path / MODEL)

    def _streams(self, modelpool: BaseModelPool) -> bool:
        """Return whether the result is merged from file to file.

        Raises:
            UserError: it has to be, and cannot.
        """
        if self.streamed is False or (self.streamed == "auto" and self._result_file() is None):
            return False
        obstacles = []
        if type(self).merged is not Merge.merged:
            obstacles.append(f"{type(self).__name__} makes the network in its own way")
        if self.alignment is not None:
            by = self.alignment.by
            obstacles.append(f"align={by} needs whole networks in memory (choose align=null)")
        if self.normalise_rows:
            obstacles.append("normalise_rows needs whole networks (choose normalise_rows=false)")
        if self._fabric is not None and self._fabric.world_size > 1:
            obstacles.append(f"{self._fabric.world_size} processes share the run (use one)")
        if self.head == "joint":
            obstacles.append("head=joint uses the experts' images (choose head=tasks)")
        model = modelpool.architecture(modelpool.pretrained_or_first_name)
        treatment = self._treatment(modelpool, model)
        obstacles += obstacles_to_streaming(modelpool, self.rule, treatment)
        if self.streamed == "auto":
            return not obstacles and stored_bytes(modelpool) >= STREAMED_FROM
        if obstacles:
            raise UserError(
                f"streamed=true merges from file to file, but {'; '.join(obstacles)}; or choose "
                f"streamed=auto"
            )
        return True

    def _check_needs(self, modelpool: BaseModelPool) -> None:
        """Check that the pool meets the requirements of the method and its rule.

        Raises:
            NotApplicableError: it does not.
        """
        rule = type(self.rule).__name__
        for name, needs in ((type(self).__name__, self.needs), (rule, self.rule.needs)):
            if Need.BASE in needs and not modelpool.has_pretrained:
                raise NotApplicableError(
                    f"{name} needs a base, and the pool has only "
                    f"{', '.join(modelpool.all_model_names)}; add a member named '{PRETRAINED}'"
                )
            if name == rule and self.rule.statistics and not self.rule.sequential:
                continue  # cards may have them, see check_statistics
            if needs & {Need.IMAGES, Need.LABELS} and not modelpool.has_data("train"):
                lacking = [n for n in modelpool.model_names if not modelpool.has_data("train", n)]
                raise NotApplicableError(
                    f"{name} needs training images of every expert, and the pool has none of "
                    f"{', '.join(lacking)}{_but_cards(modelpool, lacking)}"
                )
        if not self.rule.sequential:
            check_statistics(modelpool, self.rule.statistics)
        elif "cross" not in self.rule.statistics and not isinstance(modelpool.images(), Mapping):
            raise NotApplicableError(
                f"{rule}.sequential: all experts have the same training images, for which the "
                f"result is the average, whatever the images are; use sequential=false, or give "
                f"each expert its own in train_datasets"
            )

    def _check_order_of_cards(
        self, modelpool: BaseModelPool, plan: HeadPlan, treatment: str
    ) -> None:
        """Check that no units are reordered whose statistics are on a card.

        Raises:
            UserError: the alignment reorders them.
        """
        read = self.rule.statistics or treatment == "grams" or plan.kind == "joint"
        with_cards = [name for name in modelpool.model_names if modelpool.has_card(name)]
        if self.alignment is not None and read and with_cards:
            cure = self.without_alignment or "method=regmean method.rule.folded=true"
            raise UserError(
                f"align={self.alignment.by} reorders the units of the experts, and the cards of "
                f"{', '.join(with_cards)} have them in the owners' order; choose {cure}, or align "
                f"the networks first and have their cards written again"
            )

    def _report(self, assembly: Assembly, result: nn.Module) -> None:
        members, plan = assembly.members, assembly.plan
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
        log.info("Batch norm: %s", assembly.treatment)
        self.report.update(
            experts=list(members.names),
            selected_layers=self._selected,
            candidate_layers=len(members.layers),
            head=plan.kind,
            head_tensors=[] if plan.head_is_a_layer else list(members.head.tensors),
            tasks=list(result.tasks) if isinstance(result, MultiTaskNetwork) else None,
            batch_norm=assembly.treatment,
            cards=[name for name in members.names if assembly.modelpool.has_card(name)],
            streamed=assembly.members.stored is not None,
        )


def _merged_layers(assembly: Assembly) -> list[Layer]:
    """Return the layers that are merged, without the head unless it is an ordinary layer."""
    members = assembly.members
    head = () if assembly.plan.head_is_a_layer else members.head.tensors
    return [
        layer
        for layer in members.layers
        if layer.name in assembly.choice and layer.weight not in head
    ]


def _but_cards(modelpool: BaseModelPool, lacking: Sequence[str]) -> str:
    """Return the end of the message on missing images: available data and remedy."""
    if not any(modelpool.has_card(name) for name in lacking):
        return "; add them to train_datasets"
    return (
        " but cards; add images to train_datasets, or choose a method that cards suffice for, such "
        "as method=regmean method.rule.folded=true"
    )
