"""Coordinate descent over the groups of units (Git Re-Basin, Ainsworth et al., 2209.04836).

The objective is a weighted sum, over tensors that both networks have, of the inner product of the
model's tensor with the reference's. Within one group, all else held, it is linear in the
permutation: a linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fusion.alignment.assignment import best_assignment, best_block_assignment
from fusion.alignment.permutation import identity_permutation, permute_tensor, random_order
from fusion.alignment.spec import Entry, Group, PermutationSpec

AT_BOUND = 1e-9  # an objective this close to its bound, 1, is the maximum up to rounding
# Unrelated units have one favourite each with a chance of n!/nⁿ: 1e-6 for 16, nothing for more.
SURE_FROM = 16
WORTH_MOVING = 1e-10  # gains of the objective below this are rounding


@dataclass
class Search:
    """One descent: the permutations reached and their objective."""

    permutations: dict[str, Tensor]
    gains: dict[str, float]
    objective: float = 0.0
    sweeps: int = 0


@dataclass(frozen=True, eq=False)
class Matching:
    """The problem: permute the model's tensors so that they agree best with the reference's.

    Args:
        spec: The groups of units. Entries on tensors that are not in ``model`` are ignored.
        model: Tensors of the model.
        reference: Tensors of the reference, the same keys and shapes.
        weight: Weight of the inner product of each tensor, such that their sum is at most 1.
        seed: Order of the groups within a sweep.
        max_sweeps: Bound on the sweeps of one descent.
    """

    spec: PermutationSpec
    model: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    weight: Mapping[str, float]
    seed: int = 0
    max_sweeps: int = 100
    neighbours: dict[str, set[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.spec.groups:
            touched = {
                other.name
                for entry in group.entries
                if entry.tensor in self.model
                for other, _ in self.spec.by_tensor[entry.tensor]
            }
            axes = {(entry.tensor, entry.axis) for entry in group.entries}
            if len(axes) == len({tensor for tensor, _ in axes}):
                touched.discard(group.name)  # unless on both axes of one tensor: its own neighbour
            self.neighbours[group.name] = touched

    def solve(self) -> tuple[Search, float]:
        """Return the better of two descents, and the objective before any.

        The first starts from a sweep in the order of the forward pass that uses only positions
        already settled; the second from the identity. The second is skipped where the first is
        certainly optimal: it reached the upper bound, or, no lower than the identity, gave every
        unit of every group the partner that it agrees with best, with at least ``SURE_FROM`` units
        in each. (Assignments between thousands of units that disagree take minutes.)
        """
        identity = _State(self)
        before = identity.objective()
        if before >= 1 - AT_BOUND:
            return identity.search, before
        forward = _State(self)
        forward.settle_forward()
        if forward.objective() < 1 - AT_BOUND:
            forward.descend()
        sure = not forward.contested and all(g.size >= SURE_FROM for g in self.spec.groups)
        if forward.objective() >= 1 - AT_BOUND or (sure and forward.objective() >= before):
            return forward.search, before
        identity.descend()
        # Equal up to rounding: the start that moves nothing unnecessarily.
        if forward.objective() > identity.objective() + WORTH_MOVING:
            return forward.search, before
        return identity.search, before

    def reversed(self) -> Matching:
        """Return the problem of permuting the reference, to agree best with the model."""
        return replace(self, model=self.reference, reference=self.model)

    def stay(self) -> tuple[Search, float]:
        """Return the identity and its objective, for a network matched with itself."""
        state = _State(self)
        return state.search, state.objective()

    def descend_from_identity(self) -> Search:
        """Return plain coordinate descent from the identity, the baseline of the literature."""
        state = _State(self)
        state.descend()
        return state.search


class _State:
    """The model as permuted so far."""

    def __init__(self, problem: Matching) -> None:
        self.problem = problem
        self.spec = problem.spec
        self.tensors = dict(problem.model)  # replaced on change, never written to
        self.dots = {key: self._dot(key, value) for key, value in self.tensors.items()}
        self.search = Search(
            identity_permutation(self.spec), {g.name: 0.0 for g in self.spec.groups}
        )
        self.search.objective = sum(self.dots.values())
        self.contested = {group.name for group in self.spec.groups}
        # Blocks that moved carry their groups of units along: where each group's units come from.
        self.home = {
            name: (group, block, kind)
            for group in self.spec.groups
            for block, names in enumerate(group.members)
            for kind, name in enumerate(names)
        }

    def objective(self) -> float:
        """Return the objective, in float64."""
        return self.search.objective

    def _dot(self, key: str, value: Tensor) -> float:
        weight = self.problem.weight[key]
        if weight == 0:
            return 0.0
        reference = self.problem.reference[key].flatten().double()
        return weight * float(torch.dot(value.flatten().double(), reference))

    # -- the two starts ---------------------------------------------------------------------------

    def settle_forward(self) -> None:
        """Match each group once, in forward order, by the positions that are settled already."""
        pending = _Pending(self.spec, self.problem.model)
        for group in self.spec.groups:
            if group.members:
                step = self._block_step(group, pending)
            else:
                step = best_assignment(self.agreement(group.entries, group.size, pending))
            self._move(group, step, anyway=True)
            pending.settle(group)
        self.search.sweeps += 1

    def descend(self) -> None:
        """Improve group by group until none can be improved."""
        dirty = {group.name for group in self.spec.groups}
        bar = tqdm(total=self.problem.max_sweeps, desc="matching", leave=False, disable=None)
        with bar:
            for sweep in range(self.problem.max_sweeps):
                if not dirty:
                    break
                order = random_order(len(self.spec.groups), f"{self.problem.seed}/sweep {sweep}")
                for index in order.tolist():
                    group = self.spec.groups[index]
                    if group.name not in dirty:
                        continue
                    dirty.discard(group.name)
                    agreement = self.agreement(group.entries, group.size)
                    step = best_assignment(agreement)
                    if _gives_each_its_favourite(step, agreement):
                        self.contested.discard(group.name)
                    else:
                        self.contested.add(group.name)
                    if self._move(group, step):
                        dirty |= self.problem.neighbours[group.name]
                self.search.sweeps += 1
                bar.update()

    # -- one step ---------------------------------------------------------------------------------

    def agreement(
        self, entries: Sequence[Entry], size: int, pending: _Pending | None = None
    ) -> Tensor:
        """Return (size, size): inner products of the reference's units with the model's."""
        some = next(iter(self.tensors.values()))
        total = some.new_zeros(size, size)
        for entry in entries:
            key = entry.tensor
            if key not in self.tensors or self.problem.weight[key] == 0:
                continue
            reference = self.problem.reference[key]
            if pending is not None:
                settled = pending.settled(entry)
                if settled is None:
                    continue
                if isinstance(settled, Tensor):
                    reference = reference * settled.to(reference)
            a = _units(reference, entry)
            b = _units(self.tensors[key], entry)
            if a.shape[1] == 1:
                total.add_(a * b.T, alpha=self.problem.weight[key])
            else:
                total.addmm_(a, b.T, alpha=self.problem.weight[key])
        return total

    def _block_step(self, group: Group, pending: _Pending) -> Tensor:
        """Match blocks by the best possible agreement of their units, by kind of unit."""
        agreements = []
        for entries, n in _kinds(self.spec, group):
            table = self.agreement(entries, group.size * n, pending)
            agreements.append(table.view(group.size, n, group.size, n))
        return best_block_assignment(agreements) if agreements else torch.arange(group.size)

    def _move(self, group: Group, step: Tensor, *, anyway: bool = False) -> bool:
        """Permute ``group`` by ``step`` where that raises the objective, or ``anyway``."""
        if torch.equal(step, torch.arange(group.size)):
            return False
        moved: dict[str, Tensor] = {}
        for key in dict.fromkeys(entry.tensor for entry in group.entries):
            if key in self.tensors:
                parts = [(group, entry, step) for entry in group.entries if entry.tensor == key]
                moved[key] = permute_tensor(self.tensors[key], key, parts)
        dots = {key: self._dot(key, value) for key, value in moved.items()}
        gain = sum(dots[key] - self.dots[key] for key in dots)
        if gain <= WORTH_MOVING and not anyway:
            return False
        self.tensors.update(moved)
        self.dots.update(dots)
        self.search.objective = sum(self.dots.values())
        permutations = self.search.permutations
        name = group.name
        if name in self.home:
            blocks, place, kind = self.home[name]
            name = blocks.members[int(permutations[blocks.name][place])][kind]
        permutations[name] = permutations[name][step]
        self.search.gains[name] += gain
        return True


class _Pending:
    """Number of unsettled groups that still cover each position of each tensor."""

    def __init__(self, spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> None:
        self.axes: dict[str, dict[int, Tensor]] = {}
        self.rows: dict[str, Tensor] = {}  # grouped convolutions: axis 1, row by row
        self.rank = {key: value.ndim for key, value in tensors.items()}
        for key, parts in spec.by_tensor.items():
            if key not in tensors or tensors[key].ndim < 2:
                continue
            shape = tensors[key].shape
            self.axes[key] = {
                axis: torch.zeros(shape[axis], dtype=torch.int64)
                for axis in sorted({0, 1, *(entry.axis for _, entry in parts)})
            }
            if any(entry.rows is not None for _, entry in parts):
                self.rows[key] = torch.zeros(shape[:2], dtype=torch.int64)
        for group in spec.groups:
            self._add(group, 1)

    def settle(self, group: Group) -> None:
        self._add(group, -1)

    def _add(self, group: Group, change: int) -> None:
        for entry in group.entries:
            if entry.rows is not None and entry.tensor in self.rows:
                self.rows[entry.tensor][slice(*entry.rows), entry.positions.flatten()] += change
            elif entry.tensor in self.axes:
                self.axes[entry.tensor][entry.axis][entry.positions.flatten()] += change

    def settled(self, entry: Entry) -> Tensor | Literal[True] | None:
        """Return the settled part of ``entry``: all (True), nothing (None), or a mask."""
        key, other = entry.tensor, 1 - entry.axis
        if key not in self.axes:
            return True
        if key not in self.rows:
            return self._settled_on(key, [axis for axis in self.axes[key] if axis != entry.axis])
        free = self.axes[key][other] == 0
        if other == 1:
            free = free.view(1, -1) & (self.rows[key] == 0)
            used = free[entry.positions.flatten()]
        else:
            free = free.view(-1, 1).clone()
            if entry.rows is not None:
                free[: entry.rows[0]] = free[entry.rows[1] :] = True
            used = free if entry.rows is None else free[slice(*entry.rows)]
        if bool(used.all()):
            return True
        if not bool(used.any()):
            return None
        return free.view(*free.shape, *[1] * (self.rank[key] - 2))

    def _settled_on(self, key: str, axes: Sequence[int]) -> Tensor | Literal[True] | None:
        mask: Tensor | Literal[True] = True
        for axis in axes:
            free = self.axes[key][axis] == 0
            if not bool(free.any()):
                return None
            if not bool(free.all()):
                shape = [-1 if a == axis else 1 for a in range(self.rank[key])]
                mask = free.view(shape) if mask is True else mask & free.view(shape)
        return mask


def _units(tensor: Tensor, entry: Entry) -> Tensor:
    """Return (size, …): for each unit of the entry, all values at its positions."""
    if entry.rows is not None:
        tensor = tensor[slice(*entry.rows)]
    tensor = tensor.movedim(entry.axis, 0)
    size, copies = entry.positions.shape
    flat = entry.positions.flatten()
    start = int(flat[0])
    if len(flat) == int(flat[-1]) - start + 1 and bool((flat.diff() == 1).all()):
        tensor = tensor[start : start + size * copies]
    else:
        tensor = tensor[flat.to(tensor.device)]
    return tensor.reshape(size, -1)


def _kinds(spec: PermutationSpec, group: Group) -> list[tuple[list[Entry], int]]:
    """Split positions of a group of blocks into kinds of units: (entries over all blocks, n)."""
    kinds: list[tuple[list[Entry], int]] = []
    covered: dict[tuple[str, int], set[int]] = {}
    for names in zip(*group.members, strict=True):
        groups = [spec.by_name[name] for name in names]
        stacked: dict[tuple[str, int], list[Tensor]] = {}
        for one in groups:
            for entry in one.entries:
                if entry.rows is None:
                    stacked.setdefault((entry.tensor, entry.axis), []).append(entry.positions)
        entries = []
        for (tensor, axis), positions in stacked.items():
            entries.append(Entry(tensor, axis, torch.cat(positions)))
            covered.setdefault((tensor, axis), set()).update(positions[0].flatten().tolist())
        kinds.append((entries, groups[0].size))
    alone = []  # units without an equivalent inside their block
    for entry in group.entries:
        inside = covered.get((entry.tensor, entry.axis), set())
        keep = [c for c, place in enumerate(entry.positions[0].tolist()) if place not in inside]
        if keep:
            alone.append(Entry(entry.tensor, entry.axis, entry.positions[:, keep]))
    return [*kinds, (alone, 1)] if alone else kinds


def _gives_each_its_favourite(step: Tensor, agreement: Tensor) -> bool:
    chosen = agreement.gather(1, step.to(agreement.device).view(-1, 1)).view(-1)
    return bool((chosen >= agreement.max(dim=1).values).all())
