"""The permutation symmetries of a network: groups of units and their positions in tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusion.errors import UserError, suggestion


@dataclass(frozen=True, eq=False)
class Entry:
    """The units of a group along one axis of one tensor of the state dict.

    Attributes:
        tensor: State-dict key.
        axis: The axis of the units.
        positions: (size, k) int64; row i has the k positions of unit i along the axis (k > 1
            after a flatten of k pixels per channel, or for whole blocks).
        rows: First and last-but-one row of axis 0 to which the entry is confined (the rows of one
            group of a grouped convolution); ``None``: all.
        view: The shape in which the tensor is read, where that is another than its own (a row of
            weights that the forward pass makes a kernel of); axis and positions are those of it.
    """

    tensor: str
    axis: int
    positions: Tensor
    rows: tuple[int, int] | None = None
    view: tuple[int, ...] | None = None

    def __str__(self) -> str:
        flat = self.positions.flatten()
        segment = f"{int(flat.min())}:{int(flat.max()) + 1}"
        if len(flat) != int(flat.max()) - int(flat.min()) + 1:
            segment += " in part"
        rows = "" if self.rows is None else f", rows {self.rows[0]}:{self.rows[1]}"
        seen = "" if self.view is None else f" as {self.view}"
        return f"{self.tensor}{seen}[axis {self.axis}, {segment}{rows}]"


@dataclass(frozen=True, eq=False)
class Group:
    """Units that may be permuted among themselves, the same way in every entry.

    ``members`` is empty for a group of units. A group of blocks permutes whole blocks (the groups
    of a grouped convolution) *after* the units inside them have been permuted; ``members[b]`` names
    the groups of units inside block b, in the same order for each block.
    """

    name: str
    size: int
    entries: tuple[Entry, ...]
    members: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Fixed:
    """``count`` positions along an axis that stay in place, and the operation that forced it."""

    tensor: str
    axis: int
    count: int
    reason: str


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """The groups of a network, in the order in which the forward pass reaches them.

    Attributes:
        groups: Groups of units and groups of blocks.
        fixed: Positions left in place, and why.
        shapes: Shape of every tensor of the state dict.
        coverage: Share of the parameters that lie on a permutable axis, 0 to 1, of those that the
            forward pass uses (`fixed` names the others).
        by_name: The groups by name.
        by_tensor: For each state-dict key, the groups in it and their entries.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    fixed: tuple[Fixed, ...] = ()
    coverage: float = 0.0
    by_name: Mapping[str, Group] = field(init=False, repr=False)
    by_tensor: Mapping[str, tuple[tuple[Group, Entry], ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_tensor: dict[str, list[tuple[Group, Entry]]] = {}
        for group in self.groups:
            for entry in group.entries:
                by_tensor.setdefault(entry.tensor, []).append((group, entry))
        object.__setattr__(self, "by_name", {group.name: group for group in self.groups})
        object.__setattr__(self, "by_tensor", {k: tuple(v) for k, v in by_tensor.items()})

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {self.coverage:.2%} of the parameters covered"]
        for group in self.groups:
            kind = "blocks" if group.members else "units"
            lines.append(f"{group.name}: {group.size} {kind}")
            lines.extend(f"    {entry}" for entry in group.entries)
        if self.fixed:
            lines.append("fixed:")
            lines.extend(
                f"    {f.tensor}[axis {f.axis}]: {f.count} by {f.reason}" for f in self.fixed
            )
        return "\n".join(lines)


def spec_from_table(
    model: nn.Module, table: Mapping[str, Sequence[tuple[str, int]]]
) -> PermutationSpec:
    """Write a specification by hand: for each group, the (tensor, axis) pairs its units span.

    Args:
        model: The network that the table describes.
        table: Group name -> (state-dict key, axis) pairs; in each, the whole axis is the group.

    Raises:
        UserError: a tensor or an axis that the model does not have, or sizes that differ.

    Example::

        >>> import torch
        >>> from fusion.alignment import spec_from_table
        >>> first, second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        >>> hidden = [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]
        >>> spec = spec_from_table(model, {"hidden": hidden})
        >>> spec.groups[0].size
        8
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    groups = []
    for name, pairs in table.items():
        sizes = {}
        for tensor, axis in pairs:
            if tensor not in shapes:
                raise UserError(
                    f"spec: group '{name}' names the tensor '{tensor}', which "
                    f"{type(model).__name__} does not have{suggestion(tensor, shapes)}"
                )
            if not 0 <= axis < len(shapes[tensor]):
                raise UserError(
                    f"spec: group '{name}' names axis {axis} of '{tensor}', "
                    f"whose shape is {shapes[tensor]}"
                )
            sizes[f"{tensor}[{axis}]"] = shapes[tensor][axis]
        if len(set(sizes.values())) != 1:
            raise UserError(f"spec: the axes of group '{name}' must have one length, got {sizes}")
        size = next(iter(sizes.values()))
        whole = torch.arange(size).view(-1, 1)
        groups.append(Group(name, size, tuple(Entry(t, a, whole) for t, a in pairs)))
    return PermutationSpec(tuple(groups), shapes)
