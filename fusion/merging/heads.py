"""Treatments of the heads: merged where experts share their classes, else one per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.models import Head
from fusion.weights import tensors_of, weighted_mean, working_dtype

HeadChoice = Literal["auto", "pretrained", "union", "tasks", "joint"]
Kind = Literal["merged", "pretrained", "union", "tasks", "joint"]


@dataclass(frozen=True)
class HeadPlan:
    """The plan of the heads of a pool.

    Attributes:
        kind: ``merged`` (all experts share one label space: the head is a layer like any other),
            ``pretrained`` (the base's head is kept), ``union`` (the experts' rows, class by class),
            ``joint`` (one head for all classes, solved from the inputs of each expert's head) or
            ``tasks`` (one head for each task).
        labels: the classes of the result's outputs; ``None`` where they are unknown, or where there
            are several heads.
        groups: the experts by label space: those of one group share their head.
        base_shares: whether the experts have one label space, and the base has it too if there is
            a base.
        assumed: members of unknown classes, which are taken to be those of members whose heads have
            the same shape.
    """

    kind: Kind
    labels: LabelSpace | None
    groups: tuple[tuple[str, ...], ...]
    base_shares: bool
    assumed: tuple[str, ...] = ()

    @property
    def head_is_a_layer(self) -> bool:
        """Whether the head is merged like any other layer."""
        return self.kind == "merged" and self.base_shares

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the experts that share the head of the expert ``name``."""
        return next(group for group in self.groups if name in group)


def plan_heads(modelpool: BaseModelPool, head: str = "auto") -> HeadPlan:
    """Plan the heads from the members' classes.

    Two heads serve one label space where their classes are equal and in the same order.
    Shapes decide only where the classes of a member are unknown: such a member is taken to share
    the classes of the members whose heads have the same shape.

    Args:
        modelpool: base and experts.
        head: ``pretrained``, ``union``, ``joint`` or ``tasks``, or ``auto``: ``merged`` where the
            experts have one label space, ``pretrained`` where the base's classes cover all of
            theirs, else ``tasks``.

    Raises:
        UserError: a union of heads or a joint head with unknown classes, or a kept head without a
            base.
    """
    experts = modelpool.model_names
    spaces, assumed = _label_spaces(modelpool)
    groups: list[list[str]] = []
    for name in experts:
        for group in groups:
            if _share(spaces, name, group[0]):
                group.append(name)
                break
        else:
            groups.append([name])
    base = spaces.get(PRETRAINED)
    one = len(groups) == 1
    base_shares = one and (not modelpool.has_pretrained or _share(spaces, PRETRAINED, experts[0]))
    kind: Kind
    if head != "auto":
        kind = "merged" if head == "pretrained" and base_shares else head  # type: ignore[assignment]
    elif one:
        kind = "merged"
    elif isinstance(base, LabelSpace) and all(_covers(base, spaces[name]) for name in experts):
        kind = "pretrained"
    else:
        kind = "tasks"
    if kind == "pretrained" and not modelpool.has_pretrained:
        raise UserError(
            f"head=pretrained keeps the base's head, and the pool has no '{PRETRAINED}'; choose "
            f"head=auto, union or tasks"
        )
    labels: LabelSpace | None = None
    if kind == "merged":
        found = spaces[experts[0]]
        labels = found if isinstance(found, LabelSpace) else None
    elif kind == "pretrained":
        labels = base if isinstance(base, LabelSpace) else None
    elif kind == "union":
        labels = union_space(modelpool)
    elif kind == "joint":
        labels = experts_space(modelpool, head="joint")
    return HeadPlan(kind, labels, tuple(map(tuple, groups)), base_shares, tuple(assumed))


def merged_heads(
    plan: HeadPlan,
    head: Head,
    base: Mapping[str, Tensor] | None,
    experts: Mapping[str, Mapping[str, Tensor]],
    modelpool: BaseModelPool,
    joint: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return the heads, according to the plan, that are not ordinary layers.

    Args:
        plan: the plan.
        head: the head's tensors.
        base: the base's state dict.
        experts: the experts' state dicts.
        modelpool: provides classes and tasks.
        joint: the head of a ``joint`` plan, see :func:`fusion.merging.joint_head.joint_head`.

    Returns:
        task → the head's tensors; the only key is ``""`` where there is a single head. Experts of
        one label space share one mapping. Empty for a head that is merged as a layer, or kept.
    """
    if plan.kind == "joint":
        assert joint is not None
        return {"": dict(joint)}
    if plan.kind == "union":
        assert plan.labels is not None
        parts = [(experts[name], modelpool.labels(name)) for name in experts]
        rows = {key: _united(key, base, modelpool, parts, plan.labels) for key in head.tensors}
        return {"": rows}
    if plan.kind == "merged" and not plan.base_shares:
        return {"": _mean_head(head, [experts[name] for name in plan.groups[0]])}
    if plan.kind != "tasks":
        return {}
    shared = {group: _mean_head(head, [experts[name] for name in group]) for group in plan.groups}
    found: dict[str, dict[str, Tensor]] = {}
    for task, names in modelpool.tasks.items():
        group = plan.group_of(names[0])
        odd = [name for name in names if name not in group]
        if odd:
            raise UserError(
                f"task '{task}': {names[0]} and {', '.join(odd)} have different classes; give "
                f"experts of one task the same classes, or tasks of their own"
            )
        found[task] = shared[group]
    return found


def task_labels(plan: HeadPlan, modelpool: BaseModelPool) -> dict[str, LabelSpace | None]:
    """Return task → the classes of its head, for a result with one head for each task."""
    found: dict[str, LabelSpace | None] = {}
    for task, names in modelpool.tasks.items():
        space = plan.labels if plan.kind != "tasks" else modelpool.labels(names[0])
        found[task] = None if space is None else space.for_task(task)
    return found


def union_space(modelpool: BaseModelPool) -> LabelSpace:
    """Return the classes of a union of heads: the base's if they include all the experts'.

    Otherwise they are the experts' classes alone, see :func:`experts_space`.

    Raises:
        UserError: the classes of an expert are unknown.
    """
    found = experts_space(modelpool, head="union")
    base = modelpool.labels(PRETRAINED) if modelpool.has_pretrained else None
    spaces = [modelpool.labels(name) for name in modelpool.model_names]
    if base is not None and all(space is not None and base.covers(space) for space in spaces):
        return base
    return found


def experts_space(modelpool: BaseModelPool, *, head: str) -> LabelSpace:
    """Return the classes of all experts, each once.

    They are ordered by their original labels where these are known, else by first occurrence.

    Args:
        modelpool: provides the experts' classes.
        head: the choice that needs them, for the message.

    Raises:
        UserError: the classes of an expert are unknown.
    """
    spaces: list[LabelSpace] = []
    unknown = []
    for name in modelpool.model_names:
        space = modelpool.labels(name)
        if space is None:
            unknown.append(name)
        else:
            spaces.append(space)
    if unknown:
        raise UserError(
            f"head={head} needs the classes of every expert, and those of {', '.join(unknown)} are "
            f"not known; give them as the pool's classes: {{name: [class names]}}"
        )
    union = spaces[0]
    for space in spaces[1:]:
        new = [p for p in range(len(space)) if not union.covers(space.select([p]))]
        if new:
            added = space.select(new)
            both_names = union.names is not None and added.names is not None
            both_labels = union.labels is not None and added.labels is not None
            union = LabelSpace(
                (*union.labels, *added.labels) if both_labels else None,  # type: ignore[misc]
                (*union.names, *added.names) if both_names else None,  # type: ignore[misc]
            )
    if union.labels is not None:
        order = sorted(range(len(union)), key=lambda p: union.labels[p])  # type: ignore[index]
        union = union.select(order)
    return union


def union_rows(
    base: tuple[Tensor, LabelSpace] | None,
    experts: Sequence[tuple[Tensor, LabelSpace]],
    labels: LabelSpace,
) -> Tensor:
    """Return a head tensor whose row of each class is the mean over the experts with that class.

    A class without an expert keeps the base's row.

    Args:
        base: the base's tensor (classes of the base, …) and its classes.
        experts: each expert's tensor (its classes, …) and its classes.
        labels: the classes of the result's rows, in order.
    """
    rows = []
    for place in range(len(labels)):
        wanted = labels.select([place])
        known = [(tensor, own.positions(wanted)) for tensor, own in experts]
        found = [tensor[at[0]] for tensor, at in known if at is not None]
        if not found and base is not None:
            at = base[1].positions(wanted)
            found = [] if at is None else [base[0][at[0]]]
        rows.append(torch.stack([row.to(working_dtype([row])) for row in found]).mean(0))
    return torch.stack(rows).to(experts[0][0].dtype)


def _united(
    key: str,
    base: Mapping[str, Tensor] | None,
    modelpool: BaseModelPool,
    parts: Sequence[tuple[Mapping[str, Tensor], LabelSpace | None]],
    labels: LabelSpace,
) -> Tensor:
    experts = [(source[key], space) for source, space in parts if space is not None]
    for tensor, space in experts:
        if tensor.ndim == 0 or len(tensor) != len(space):
            raise UserError(
                f"head=union takes the rows of '{key}' by class, and it has the shape "
                f"{tuple(tensor.shape)} for {len(space)} classes; choose head=tasks"
            )
    own = modelpool.labels(PRETRAINED) if base is not None else None
    kept = None if base is None or own is None else (base[key], own)
    return union_rows(kept, experts, labels)


def _mean_head(head: Head, members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of heads of one label space; integer buffers are the first member's."""
    found = {}
    for key in head.tensors:
        tensors = [member[key] for member in members]
        mean = tensors[0].is_floating_point() and len(tensors) > 1
        found[key] = weighted_mean(tensors) if mean else tensors[0].clone()
    return found


@dataclass(frozen=True)
class _Unknown:
    """Unknown classes: those of a head of these shapes, of a task if one was named."""

    shapes: tuple[tuple[int, ...], ...]
    task: str | None


def _label_spaces(
    modelpool: BaseModelPool,
) -> tuple[dict[str, LabelSpace | _Unknown], list[str]]:
    """Return the classes of base and experts, and the names of those that had to be assumed."""
    names = [n for n in (PRETRAINED, *modelpool.model_names) if n in modelpool.all_model_names]
    known = {name: modelpool.labels(name) for name in names}
    if all(space is not None for space in known.values()):
        return {name: space for name, space in known.items() if space is not None}, []
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name in names:
        state = tensors_of(modelpool.architecture(name))
        shapes[name] = tuple(tuple(state[key].shape) for key in modelpool.head.tensors)
    spaces: dict[str, LabelSpace | _Unknown] = {}
    assumed = []
    for name in names:
        space = known[name]
        if space is not None:
            spaces[name] = space
            continue
        task = modelpool.named_task(name)
        candidates: list[LabelSpace] = []
        for other in names:
            theirs = known[other]
            if theirs is None or task is not None or shapes[other] != shapes[name]:
                continue
            if not any(theirs.equals(c) for c in candidates):
                candidates.append(theirs)
        alone = len(candidates) != 1
        spaces[name] = _Unknown(shapes[name], task) if alone else candidates[0]
        if task is None and (name != PRETRAINED or not alone):
            assumed.append(name)
    return spaces, assumed


def _share(spaces: Mapping[str, LabelSpace | _Unknown], first: str, second: str) -> bool:
    one, other = spaces[first], spaces[second]
    if isinstance(one, LabelSpace) and isinstance(other, LabelSpace):
        return len(one) == len(other) and one.equals(other)
    return one == other


def _covers(base: LabelSpace, other: LabelSpace | _Unknown) -> bool:
    return isinstance(other, LabelSpace) and base.covers(other)
