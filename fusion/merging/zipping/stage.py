"""Zip the experts of a pool: features, bases, merged tensors, heads and tails."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.alignment import Group, PermutationSpec, align_all, apply_permutation
from fusion.alignment.example import example_input_for
from fusion.alignment.features import feature_correlations
from fusion.alignment.permutation import permute_tensor
from fusion.errors import UserError
from fusion.merging.alignment import AlignmentStage, activation_images, symmetries
from fusion.merging.batch_norm import Calibration
from fusion.merging.folding import find_foldings
from fusion.merging.heads import HeadPlan
from fusion.merging.members import Members
from fusion.merging.zipping import basis as bases_of
from fusion.merging.zipping.applying import (
    Roles,
    merged_folding,
    merged_tensor,
    mixable,
    read_tensor,
    roles_of,
    unmerge_matrix,
)
from fusion.merging.zipping.basis import Basis
from fusion.merging.zipping.budget import Costs, choose_cut
from fusion.merging.zipping.clusters import SAME_PLACE, greedy_clusters
from fusion.modelpool import BaseModelPool
from fusion.models.cut import Cut, graph_of, reader_key
from fusion.options import ImageShape, Share, Seed, checked
from fusion.weights import load_tensors, tensors_of, working_dtype

log = logging.getLogger(__name__)

BasisKind = Literal["zip", "cca", "permutation"]


@dataclass(frozen=True)
class GroupRecord:
    """What was done to one group of units.

    Attributes:
        group: its name.
        size: units of one network.
        how: ``zip``, ``cca``, ``permutation``, or ``in place`` where no features were recorded.
        within: clusters in which some network has two units or more.
        explained: mean correlation of a unit with what is read out of the merged features for it.
    """

    group: str
    size: int
    how: str
    within: int
    explained: float


@dataclass(frozen=True, eq=False)
class Zipped:
    """What zipping makes of the members of a pool.

    Attributes:
        state: the merged tensors; of a network that is cut, the trunk's.
        base: the base's head, reading merged features; ``None`` without a base.
        heads: expert → its head, reading merged features.
        cut: where the network is cut, ``None`` where it is merged whole.
        tails: expert → its own tensors behind the cut, bit for bit, with what reads the merged
            features out for it; nothing where the network is merged whole.
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
    """How experts are merged in a common basis of their features.

    Attributes:
        basis, within_budget, repeat_factor, budget, folded: see :class:`fusion.method.ZipIt`.
        shape: of one input, (C, H, W); by default that of the pool's first training image.
        seed: of the order in which groups are visited where they are aligned.
        calibration: the sample of images whose features are compared.
    """

    basis: BasisKind = "zip"
    within_budget: Share = 0.0
    repeat_factor: Share = 1.0
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
            plan: what becomes of the heads.
            device: where features are computed.
        """
        network = members.network.eval()
        spec = symmetries(network, modelpool, self.shape)
        roles = roles_of(network, members.layers)
        cut, costs = self._cut(members, modelpool)
        keys = [key for key in tensors_of(network) if cut is None or key in set(cut.trunk)]
        shared = _restricted(spec, keys)
        data = activation_images(modelpool, self.calibration)
        models = {name: modelpool.load_model(name).eval() for name in members.names}
        reference = network if members.base is not None else models[members.names[0]]
        orders: dict[str, Mapping[str, Tensor]] = dict.fromkeys(models, {})
        if self.basis == "permutation" or any(group.members for group in spec.groups):
            # Blocks change places as a whole before the units inside are merged.
            found = align_all(
                models, reference, spec=spec, by="activations", data=data, seed=self.seed,
                device=device,
            )  # fmt: skip
            orders = {name: one.permutations for name, one in found.items()}
            models = {name: one.model for name, one in found.items()}
        tensors = {name: tensors_of(copy.deepcopy(model)) for name, model in models.items()}
        foldings = find_foldings(network, members.layers) if self.folded else {}
        foldings = {n: one for n, one in foldings.items() if one.layer.weight in keys}
        # Half precisions are widened, so that rounding does not decide which units are alike.
        seen = [*models.values()] + ([] if members.base is None else [modelpool.load_model(
            modelpool.pretrained_or_first_name).eval()])  # fmt: skip
        for model in seen:
            model.to(working_dtype(model.parameters()))
            for folding in foldings.values():
                load_tensors(model, folding.folded(tensors_of(model)))
        correlations = feature_correlations(shared, seen, data, device=device)
        bases, of_base, records = self._bases(
            shared, roles, correlations, len(models), members.base is not None
        )
        head = members.head
        floating = [
            key for key in keys
            if next(iter(tensors.values()))[key].is_floating_point()
            and (key not in head or (plan.head_is_a_layer and cut is None))
        ]  # fmt: skip
        state = {
            key: merged_tensor(
                key, [of_expert[key] for of_expert in tensors.values()], shared, bases, roles
            ).to(members.network.state_dict()[key].dtype)
            for key in floating
        }
        for folding in foldings.values():
            found = merged_folding(folding, list(tensors.values()), shared, bases, roles)
            state |= {k: t.to(state[k].dtype) for k, t in found.items() if k in state}
        heads, tails = {}, {}
        for i, (name, of_expert) in enumerate(tensors.items()):
            readers = {group: basis.unmerge[i] for group, basis in bases.items()}
            heads[name] = {k: read_tensor(k, of_expert[k], shared, readers, roles) for k in head.tensors}
            if cut is not None:
                own = members.experts[name]
                tails[name] = {k: own[k] for k in own if k not in set(cut.trunk)}
                for number, one in enumerate(one for one in cut.crossings if one.source):
                    key = _channel_key(one.source, own, roles)
                    matrix = unmerge_matrix(key, shared, readers, roles, one.channels)
                    matrix = _in_own_order(matrix, key, own[key], spec, orders[name], roles)
                    dense = self.basis == "cca"
                    read = matrix.to(own[key].dtype) if dense else matrix.argmax(1)
                    tails[name][reader_key(number, dense=dense)] = read
        base = members.base and {
            key: read_tensor(key, members.base[key], shared, of_base, roles) for key in head.tensors
        }
        return Zipped(state, base, heads, cut, tails, costs, records)

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
            dense=self.basis == "cca",
        )
        if cut is None:
            log.warning("budget=%g leaves no layer to the tasks alone: all are merged", self.budget)
        return cut, costs

    def _bases(
        self,
        spec: PermutationSpec,
        roles: Roles,
        correlations: Mapping[str, Tensor],
        networks: int,
        has_base: bool,
    ) -> tuple[dict[str, Basis], dict[str, Tensor], tuple[GroupRecord, ...]]:
        """Return group → basis of the experts; group → unmerge matrix of the base; records."""
        found, of_base, records = {}, {}, []
        reference = networks if has_base else 0
        for group in spec.groups:
            if group.members:
                continue
            whole = correlations.get(group.name)
            n = networks * group.size
            same = whole is None or self.basis == "permutation"
            how: str = self.basis
            if same:
                part = None if whole is None else whole[:n, :n]
                basis = bases_of.of_reference(networks, group.size, part)
                how = "in place" if whole is None else how
            elif self.basis == "cca" and mixable(spec, roles, group):
                basis = bases_of.canonical(whole, networks, reference)
            elif self.basis == "cca":
                order = bases_of.assigned(whole, networks, reference)
                basis = bases_of.of_permutations(order, whole[:n, :n])
                how = "permutation"
            else:
                clusters = greedy_clusters(
                    whole[:n, :n],
                    networks,
                    within_budget=self.within_budget,
                    repeat_factor=self.repeat_factor,
                )
                basis = bases_of.of_clusters(clusters, whole[:n, :n])
            found[group.name] = basis
            if has_base:
                # In the other bases the merged features are in the base's coordinates.
                of_base[group.name] = torch.eye(group.size, dtype=torch.float64)
                if whole is not None and how == "zip":
                    of_base[group.name] = _nearest(whole, basis)
            within = 0 if how == "cca" else int((basis.unmerge.sum(1) > 1).any(0).sum())
            records.append(GroupRecord(group.name, group.size, how, within, basis.explained()))
        return found, of_base, tuple(records)


def _restricted(spec: PermutationSpec, keys: Sequence[str]) -> PermutationSpec:
    """Return the groups with their entries on some tensors; without the groups that have none."""
    wanted = set(keys)
    groups: list[Group] = []
    for group in spec.groups:
        entries = tuple(entry for entry in group.entries if entry.tensor in wanted)
        if entries:
            groups.append(dataclasses.replace(group, entries=entries))
    return PermutationSpec(tuple(groups), spec.shapes)


def _nearest(correlation: Tensor, basis: Basis) -> Tensor:
    """Return which feature each unit of the base is most like: its unmerge matrix, of 0 and 1."""
    networks, size = basis.networks, basis.merge.shape[1]
    theirs = correlation[networks * size :, : networks * size].view(size, networks, size)
    theirs = theirs + SAME_PLACE * torch.eye(size).unsqueeze(1)
    like = torch.einsum("jnl,ncl->jc", theirs.double(), basis.merge)
    return F.one_hot(like.argmax(1), size).double()


def _channel_key(source: str, state: Mapping[str, Tensor], roles: Roles) -> str:
    """Return a tensor whose axis of outputs are the channels of a norm or layer."""
    for name in ("weight", "running_mean"):
        if f"{source}.{name}" in state:
            return f"{source}.{name}"
    return next(key for key in roles.outputs if key.startswith(f"{source}."))


def _in_own_order(
    matrix: Tensor,
    key: str,
    tensor: Tensor,
    spec: PermutationSpec,
    order: Mapping[str, Tensor],
    roles: Roles,
) -> Tensor:
    """Return a map to channels that were permuted as a map to the channels as they were."""
    parts = [
        (group, entry, order[group.name])
        for group, entry in spec.by_tensor.get(key, ())
        if group.name in order
    ]
    if not parts:
        return matrix
    axis = roles.outputs.get(key, 0)
    shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
    numbers = torch.arange(len(matrix)).view(shape).expand(tensor.shape).clone()
    at = permute_tensor(numbers, key, parts).movedim(axis, 0).flatten(1)[:, 0]
    result = torch.empty_like(matrix)
    result[at] = matrix
    return result
