"""Merge units by their features, also within a network: ZipIt! (arXiv 2305.03053)."""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated, ClassVar, Literal

from torch import nn

from fusion.errors import UserError
from fusion.merging.assembly import Assembly
from fusion.merging.batch_norm import recalibrate, recalibrate_tasks, statistics_keys
from fusion.merging.heads import HeadChoice, merged_heads, task_labels
from fusion.merging.rule import Need
from fusion.merging.rules import Mean
from fusion.merging.zipping import BasisKind, Zipped, ZipStage
from fusion.method.merge import Merge
from fusion.modelpool import BaseModelPool
from fusion.models import CutNetwork, MultiTaskNetwork
from fusion.options import ImageShape, Positive, SampleSize, Seed, Share, Within, checked
from fusion.weights import load_tensors

log = logging.getLogger(__name__)

Statistics = Literal["auto", "merge", "recalibrate", "recalibrate_per_task"]
Budget = Annotated[float, Within(least=1)]


class ZipIt(Merge):
    r"""Merge units whose features correlate, between networks and within each of them.

    For each group of units that the network's symmetries tie together, the features of all experts
    on all experts' images are brought into one basis by a merge matrix M, and read out of it by an
    unmerge matrix U:

    .. math::
        z = \sum_i M_i x_i, \qquad x_i \approx U_i z, \qquad
        W = \sum_i M_i^{\mathrm{out}}\, W_i\, U_i^{\mathrm{in}}

    Layers before the last are merged so, heads of different classes read U. Biases, norm parameters
    and running means are linear in M, running variances quadratic. The groups come from the
    network's graph, so that sums, concatenations, and grouped and depthwise convolutions are
    respected: blocks of a grouped convolution are permuted as a whole, and only units at the same
    place of a block are merged.

    Any number of experts can be merged, of one base or separately trained. A base is not a part of
    the merge. With ``basis=zip`` the order of the experts does not matter, up to ties; otherwise
    the first one is the reference where there is no base.

    With a ``budget`` only as many layers as needed are shared: the result has one trunk and a tail
    per task, each an expert's own layers bit for bit, before which U reads the expert's features
    out of the trunk's (partial zip, section 4.3). ``result.outputs(images)`` runs the trunk once.

    Args:
        basis: ``zip``: means of clusters of units, found greedily; ``cca``: canonical correlation
            analysis (CCA Merge, Horoi et al., arXiv 2407.05385), and permutations where a unit
            cannot be mixed with others (depthwise kernels); ``permutation``: each unit with one of
            each other expert, the average after alignment by activations.
        within_budget: β of ZipIt, for ``zip``: the share of a network's units that may be merged
            into other units of the same network.
        repeat_factor: α of ZipIt, for ``zip``: the factor on the correlations of a cluster each
            time it grows; 1 does not penalise growth.
        ridge: for ``cca``: of the whitening, relative to the features' variance.
        budget: multiply-adds of all tasks' bodies together, as a multiple of one network's body;
            by default everything is merged.
        folded: whether a layer and the batch norm behind it are merged as one affine map, so that
            units are weighted by the scale of their outputs; otherwise tensor by tensor.
        batch_norm: running statistics: ``merge`` (the experts' in the common basis),
            ``recalibrate`` (measured again on a sample of the pool's training images),
            ``recalibrate_per_task`` (one set per task), ``auto`` (recalibrate). With a budget these
            are the trunk's statistics; the tails keep the experts', except that under
            ``recalibrate_per_task``, and then also ``auto``, they are measured again on the task's
            images behind the trunk.
        head, calibration_images, batch_size, example_input, seed: see
            :class:`~fusion.method.Merge`; the calibration images are also those whose features
            are compared.

    Raises:
        UserError: an invalid option.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.IMAGES})
    without_alignment: ClassVar[str] = ""

    @checked
    def __init__(
        self,
        *,
        basis: BasisKind = "zip",
        within_budget: Share = 0.3,
        repeat_factor: Share = 1.0,
        ridge: Positive = 0.1,
        budget: Budget | None = None,
        folded: bool = True,
        head: HeadChoice = "auto",
        batch_norm: Statistics = "auto",
        calibration_images: SampleSize = 2000,
        batch_size: SampleSize = 128,
        example_input: ImageShape | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            rule=Mean(),
            head=head,
            batch_norm=batch_norm,
            calibration_images=calibration_images,
            batch_size=batch_size,
            example_input=example_input,
            streamed=False,
            plot=False,
            seed=seed,
        )
        if budget is not None and head not in ("auto", "tasks"):
            raise UserError(
                f"budget={budget:g} keeps each expert's own head, and head={head} makes another; "
                f"choose head=auto, or budget=null"
            )
        self._measures_tails = batch_norm in ("auto", "recalibrate_per_task")
        self.zipping = ZipStage(
            basis,
            within_budget,
            repeat_factor,
            ridge,
            budget,
            folded,
            example_input,
            seed,
            self.calibration,
        )

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the pool can be merged with these options.

        Raises:
            UserError: the pool cannot be merged with these options.
        """
        super().check_pool(modelpool)
        self.zipping.check(modelpool)

    def merged(self, assembly: Assembly) -> nn.Module:
        """Return the network in the common basis, or one trunk with a tail for each task."""
        with self.profile("zip features"):
            zipped = self.zipping.run(
                assembly.members, assembly.modelpool, assembly.plan, device=self.fabric.device
            )
        self._write(zipped)
        with self.profile("batch norm"):
            if zipped.cut is not None:
                return self._partial(assembly, zipped)
            heads = merged_heads(
                assembly.plan,
                assembly.members.head,
                zipped.base,
                zipped.heads,
                assembly.modelpool,
            )
            kept = zipped.base if assembly.plan.kind == "pretrained" else None
            return assembly.network({**zipped.state, **(kept or {})}, heads)

    def _partial(self, assembly: Assembly, zipped: Zipped) -> MultiTaskNetwork:
        """Return the trunk, recalibrated on all experts' images, with the experts' own tails."""
        assert zipped.cut is not None
        body = assembly.members.body()
        load_tensors(body, zipped.state)
        trunk = set(zipped.cut.trunk)
        norms = [m.rpartition(".")[0] for m, _ in statistics_keys(body) if m in trunk]
        if assembly.treatment != "merge" and norms:
            recalibrate(body, assembly.modelpool, self.fabric, self.calibration, norms=norms)
        cut = CutNetwork(body, zipped.cut.layer, dense=self.zipping.basis == "cca")
        own = {task: zipped.tails[names[0]] for task, names in assembly.modelpool.tasks.items()}
        plan = dataclasses.replace(assembly.plan, kind="tasks")
        network = MultiTaskNetwork.assemble(cut, own, task_labels(plan, assembly.modelpool))
        others = [m.rpartition(".")[0] for m, _ in statistics_keys(body) if m not in trunk]
        if self._measures_tails:
            recalibrate_tasks(network, assembly.modelpool, self.fabric, self.calibration, others)
        return network

    def _write(self, zipped: Zipped) -> None:
        """Describe the merge in the report and the log."""
        costs = zipped.costs
        self.report["zip"] = {
            "basis": self.zipping.basis,
            "groups": [dataclasses.asdict(group) for group in zipped.groups],
            "first_separate_layer": None if zipped.cut is None else zipped.cut.layer,
            "multiply_adds": None if costs is None else dataclasses.asdict(costs),
            "share_of_one_network": None if costs is None else costs.share,
        }
        measured = [group for group in zipped.groups if group.how != "in place"]
        total = sum(group.size for group in measured)
        if total:
            explained = sum(group.explained * group.size for group in measured) / total
            log.info("Zipped %d units in %d groups: a unit correlates by %.3f with its readout, "
                     "on average", total, len(measured), explained)  # fmt: skip
        for group in zipped.groups:
            if group.how == "in place":
                log.info(
                    "No features of the group %s were recorded: averaged in place", group.group
                )
        if zipped.cut is not None and costs is not None:
            log.info("Separate from %s on: %.2f times one network's multiply-adds",
                     zipped.cut.layer, costs.share)  # fmt: skip
