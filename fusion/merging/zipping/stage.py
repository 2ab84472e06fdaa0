"""Zip the experts of a pool: features, bases, merged tensors, heads and tails."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion.alignment import Group, PermutationSpec, align_all
from fusion.alignment.example import example_input_for
from fusion.alignment.features import feature_correlations
from fusion.errors import UserError
from fusion.merging.alignment import AlignmentStage, activation_images, symmetries
from fusion.merging.batch_norm import Calibration
from fusion.merging.folding import Folding, find_foldings
from fusion.merging.heads import HeadPlan
from fusion.merging.members import Members
from fusion.merging.zipping.applying import (
    Roles,
    merged_folding,
    merged_tensor,
    read_tensor,
    roles_of,
)
from fusion.merging.zipping.basis import Basis
from fusion.merging.zipping.budget import Costs, choose_cut
from fusion.merging.zipping.groups import BasisKind, Clustering, GroupRecord, find_bases
from fusion.merging.zipping.tails import readers_of
from fusion.modelpool import BaseModelPool
from fusion.models.cut import Cut, graph_of
from fusion.options import ImageShape, Positive, Seed, Share, checked
from fusion.weights import load_tensors, tensors_of, working_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Zipped:
    """Result of zipping the members of a pool.

    Attributes:
        state: the merged tensors; those of the trunk, for a network that is cut.
        base: the base's head, reading merged features; ``None`` without a base.
        heads: expert → its head, reading merged features.
        cut: where the network is cut, ``None`` where it is merged whole.
        tails: expert → its own tensors behind the cut, bit for bit, with its readout of the merged
            features; empty where the network is merged whole.
        costs: multiply-adds; ``None`` where no budget was given.
        groups: one record for each group of units.
    """

    state: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None
    heads: Mapping[str, Mapping[str, Tensor]]
    cut: Cut | None
    tails: Mapping[str, Mapping[str, Tensor]]
    costs: Costs | None
    groups: tuple[GroupRecord, ...]


@checked
@dataclass(frozen=True)
class ZipStage:
    """Options of merging experts in a common basis of their features.

    Attributes:
        basis, within_budget, repeat_factor, ridge, budget, folded: see
            :class:`fusion.method.ZipIt`.
        shape: of one input, (C, H, W); by default that of the pool's first training image.
        seed: of the order in which groups are visited where they are aligned.
        calibration: the sample of images whose features are compared.
    """

    basis: BasisKind = "zip"
    within_budget: Share = 0.3
    repeat_factor: Share = 1.0
    ridge: Positive = 0.1
    budget: float | None = None
    folded: bool = True
    shape: ImageShape | None = None
    seed: Seed = 0
    calibration: Calibration = dataclasses.field(default_factory=Calibration)

    def check(self, modelpool: BaseModelPool) -> None:
        """Check, before any work, that the pool's networks can be zipped.

        Raises:
            UserError: the network cannot be traced, or not be cut, or a task has several experts.
        """
        AlignmentStage("activations", self.shape, self.seed, self.calibration).check(modelpool)
        if self.budget is None:
            return
        graph_of(modelpool.architecture(modelpool.pretrained_or_first_name).eval())
        for task, names in modelpool.tasks.items():
            if len(names) > 1:
                raise UserError(
                    f"budget={self.budget:g} keeps the last layers of each task's expert, and the "
                    f"task '{task}' has several: {', '.join(names)}; give each a task of its own, "
                    f"or choose budget=null"
                )

    def run(
        self,
        members: Members,
        modelpool: BaseModelPool,
        plan: HeadPlan,
        *,
        device: torch.device | str,
    ) -> Zipped:
        """Return the members' merged tensors.

        Args:
            members: base and experts.
            modelpool: has the experts as networks, and images.
            plan: the plan of the heads.
            device: where features are computed.
        """
        network = members.network.eval()
        spec = symmetries(network, modelpool, self.shape)
        roles = roles_of(network, members.layers)
        cut, costs = self._cut(members, modelpool)
        keys = [key for key in tensors_of(network) if cut is None or key in set(cut.trunk)]
        foldings = find_foldings(network, members.layers) if self.folded else {}
        foldings = {name: one for name, one in foldings.items() if one.layer.weight in keys}
        shared = _restricted(spec, keys)
        data = activation_images(modelpool, self.calibration)
        models = {name: modelpool.load_model(name).eval() for name in members.names}
        orders: dict[str, Mapping[str, Tensor]] = {name: {} for name in models}
        if self.basis == "permutation" or any(group.members for group in spec.groups):
            # Blocks change places as a whole before the units inside are merged.
            reference = network if members.base is not None else models[members.names[0]]
            found = align_all(
                models,
                reference,
                spec=spec,
                by="activations",
                data=data,
                seed=self.seed,
                device=device,
            )
            models = {name: one.model for name, one in found.items()}
            orders = {name: one.permutations for name, one in found.items()}
        tensors = {name: tensors_of(copy.deepcopy(model)) for name, model in models.items()}
        seen = list(models.values())
        if members.base is not None:
            seen.append(modelpool.load_model(modelpool.pretrained_or_first_name).eval())
        for model in seen:
            _prepare(model, foldings)
        bases = find_bases(
            shared,
            roles,
            feature_correlations(shared, seen, data, device=device),
            Clustering(self.basis, self.within_budget, self.repeat_factor, self.ridge),
            networks=len(models),
            has_base=members.base is not None,
        )
        own_head = () if plan.head_is_a_layer and cut is None else members.head.tensors
        state = _merged(
            [key for key in keys if key not in own_head],
            list(tensors.values()),
            foldings,
            shared,
            bases.experts,
            roles,
        )
        heads: dict[str, dict[str, Tensor]] = {}
        tails: dict[str, dict[str, Tensor]] = {}
        for i, (name, own) in enumerate(tensors.items()):
            readers = bases.readers(i)
            heads[name] = {
                key: read_tensor(key, own[key], shared, readers, roles)
                for key in members.head.tensors
            }
            if cut is not None:
                kept = members.experts[name]
                tails[name] = {key: kept[key] for key in kept if key not in set(cut.trunk)}
                tails[name] |= readers_of(
                    cut, kept, spec, shared, readers, roles, orders[name], dense=self._dense
                )
        base = None
        if members.base is not None:
            base = {
                key: read_tensor(key, members.base[key], shared, bases.base, roles)
                for key in members.head.tensors
            }
        return Zipped(state, base, heads, cut, tails, costs, bases.records)

    @property
    def _dense(self) -> bool:
        return self.basis == "cca"

    def _cut(self, members: Members, modelpool: BaseModelPool) -> tuple[Cut | None, Costs | None]:
        if self.budget is None:
            return None, None
        example = modelpool.example_input() if self.shape is None else None
        if example is None:
            example = example_input_for(members.network, self.shape)
        cut, costs = choose_cut(
            members.network,
            members.head,
            example[:1],
            tasks=len(modelpool.tasks),
            budget=self.budget,
            dense=self._dense,
        )
        if cut is None:
            log.warning("budget=%g leaves no layer to the tasks alone: all are merged", self.budget)
        return cut, costs


def _prepare(model: nn.Module, foldings: Mapping[str, Folding]) -> None:
    """Prepare a network for comparison, in place: widened, and batch norm folded.

    Half precisions are widened so that rounding does not decide the similarity of units.
    """
    model.to(working_dtype(model.parameters()))
    for folding in foldings.values():
        load_tensors(model, folding.folded(tensors_of(model)))


def _merged(
    keys: Sequence[str],
    networks: Sequence[Mapping[str, Tensor]],
    foldings: Mapping[str, Folding],
    spec: PermutationSpec,
    bases: Mapping[str, Basis],
    roles: Roles,
) -> dict[str, Tensor]:
    """Return the merged tensors; integer buffers are not among them."""
    merged: dict[str, Tensor] = {}
    for folding in foldings.values():
        merged |= merged_folding(folding, networks, spec, bases, roles)
    for key in keys:
        if key not in merged and networks[0][key].is_floating_point():
            tensors = [network[key] for network in networks]
            merged[key] = merged_tensor(key, tensors, spec, bases, roles)
    return {key: tensor.to(networks[0][key].dtype) for key, tensor in merged.items()}


def _restricted(spec: PermutationSpec, keys: Sequence[str]) -> PermutationSpec:
    """Return the groups with their entries on some tensors; without the groups that have none."""
    wanted = set(keys)
    groups: list[Group] = []
    for group in spec.groups:
        entries = tuple(entry for entry in group.entries if entry.tensor in wanted)
        if entries:
            groups.append(dataclasses.replace(group, entries=entries))
    return PermutationSpec(tuple(groups), spec.shapes)
