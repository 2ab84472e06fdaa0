"""The rows of a head: one for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.models.head import Head


def select_rows(
    state_dict: Mapping[str, Tensor], head: Head, rows: Sequence[int], *, classes: int
) -> dict[str, Tensor]:
    """Return the tensors of ``head`` with the rows of some classes only.

    Args:
        state_dict: weights of the network with all classes.
        head: its head; every tensor in it has one row for each class, or no rows at all.
        rows: the classes that are kept; row ``k`` of the result is row ``rows[k]`` of the head.
        classes: number of classes of the head.

    Returns:
        new tensors, by their state-dict keys.

    Raises:
        UserError: a tensor of the head has another number of rows than there are classes, or a
            row does not exist or is named twice.
    """
    outside = sorted(row for row in set(rows) if not 0 <= row < classes)
    if outside or len(set(rows)) < len(rows):
        raise UserError(
            f"rows {list(rows)} of a head of {classes} classes; name existing rows, each once"
        )
    selected: dict[str, Tensor] = {}
    for key in head.tensors:
        tensor = state_dict[key].detach()
        if tensor.ndim and len(tensor) != classes:
            raise UserError(
                f"{key} has {len(tensor)} rows and the head {classes} classes, so that its rows "
                f"cannot be matched to classes; start from a fresh head instead: head=fresh"
            )
        selected[key] = tensor[list(rows)] if tensor.ndim else tensor.clone()
    return selected


class Shaped(Protocol):
    """Anything with a shape: a tensor, or its description in a file before it is read."""

    @property
    def shape(self) -> Sequence[int]:
        """Size along each dimension."""


def resize_head(model: nn.Module, state: Mapping[str, Shaped]) -> None:
    """Change the tensors of ``model`` to the shapes in ``state``, in place.

    Parameters and buffers of another shape are replaced by new, uninitialised ones, and the sizes
    that torch's layers keep as attributes are updated.

    Args:
        model: the network.
        state: state-dict keys and tensors; those that already fit are not changed.
    """
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        held = getattr(module, name)
        if held.shape == torch.Size(tensor.shape):
            continue
        empty = held.new_empty(torch.Size(tensor.shape))
        if isinstance(held, nn.Parameter):
            setattr(module, name, nn.Parameter(empty, requires_grad=held.requires_grad))
        else:
            setattr(module, name, empty)
        for size in ("out_features", "out_channels", "num_features"):
            if getattr(module, size, None) == held.shape[0]:
                setattr(module, size, tensor.shape[0])
