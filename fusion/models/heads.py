"""The head of a network: the tensors whose rows are its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fusion.errors import UserError

_SHOWN = 3  # tensors named in an error before the rest is counted


class Shaped(Protocol):
    """Anything with a shape: a tensor, or what a checkpoint tells of one without reading it."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of the dimensions."""


S = TypeVar("S", bound=Shaped)


def head_names(
    model_or_state: nn.Module | Mapping[str, Shaped], other: nn.Module | Mapping[str, Shaped]
) -> tuple[str, ...]:
    """Return the tensors in which two networks of one architecture differ in shape.

    These are the head. They have a row for each class, so they may differ in the number of rows
    and in nothing else. Nothing is returned where the networks have equally many classes.

    Args:
        model_or_state: a network, its state dict, or any mapping from names to shapes.
        other: the network to compare with, likewise.

    Returns:
        the names, in the order of the first network.

    Raises:
        UserError: names the tensors that only one of the two has, that differ in more than the
            number of rows, or that would give one network two different numbers of classes.
    """
    first, second = _state(model_or_state), _state(other)
    missing = [key for key in first if key not in second]
    added = [key for key in second if key not in first]
    if missing or added:
        parts = [f"lacks {_listed(missing)}"] if missing else []
        parts += [f"has {_listed(added)} besides"] if added else []
        raise UserError(
            f"two networks must share one architecture up to the head, but the second "
            f"{' and '.join(parts)}"
        )
    head = tuple(key for key in first if tuple(first[key].shape) != tuple(second[key].shape))
    for key in head:
        a, b = tuple(first[key].shape), tuple(second[key].shape)
        if not a or not b or a[1:] != b[1:]:
            raise UserError(
                f"{key} is {a} in one network and {b} in the other; two networks must share one "
                "architecture up to the head, and a head differs in its rows (classes) only"
            )
    for state in (first, second):
        rows = {key: state[key].shape[0] for key in head}
        if len(set(rows.values())) > 1:
            found = ", ".join(f"{key} has {count} rows" for key, count in rows.items())
            raise UserError(
                f"not every tensor whose shape differs can belong to the head: {found}; a head "
                "has one row for each class"
            )
    return head


def slice_head(
    state_dict: Mapping[str, Tensor],
    *,
    like: nn.Module | Mapping[str, Shaped],
    rows: Sequence[int],
    head: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Fit a network's weights to one with fewer classes: keep the head's rows of these classes.

    Args:
        state_dict: weights of the network that knows all classes.
        like: the network to fill, its state dict, or any mapping from names to shapes.
        rows: the classes kept; row ``k`` of the new head is row ``rows[k]`` of the old one.
        head: names of the head's tensors; by default those whose shape differs. Needed only where
            both networks have equally many classes and ``rows`` puts them in another order.

    Returns:
        a new state dict with the shapes of ``like``; the tensors of the head are copies, the
        others are those of ``state_dict``.

    Raises:
        UserError: if the networks differ in more than the head, if a row does not exist, is
            repeated, or if there are more or fewer rows than ``like`` has classes.
    """
    target = _state(like)
    differing = head_names(state_dict, target)
    names = differing if head is None else tuple(head)
    _check_names(names, differing, state_dict)
    if not names:
        if list(rows) != list(range(len(rows))):
            raise UserError(
                f"the two networks have heads of one shape, so the head that is to be reordered "
                f"by rows {list(rows)} cannot be told from them; name its tensors: head=[…]"
            )
        return dict(state_dict)
    for name in names:
        _check_rows(name, rows, len(state_dict[name]), target[name].shape[0])
    result = dict(state_dict)
    for name in names:
        index = torch.tensor(list(rows), device=state_dict[name].device)
        result[name] = state_dict[name].detach().index_select(0, index)
    return result


def _state(model_or_state: nn.Module | Mapping[str, S]) -> Mapping[str, S | Tensor]:
    if isinstance(model_or_state, nn.Module):
        return model_or_state.state_dict()
    return model_or_state


def _check_names(names: Sequence[str], differing: Sequence[str], state: Mapping[str, S]) -> None:
    unknown = [name for name in names if name not in state]
    if unknown:
        raise UserError(f"the network has no {_listed(unknown)} to take rows of")
    left_out = [name for name in differing if name not in names]
    if left_out:
        raise UserError(
            f"{_listed(left_out)} must be among the head's tensors: their shapes differ"
        )


def _check_rows(name: str, rows: Sequence[int], available: int, wanted: int) -> None:
    outside = sorted(row for row in set(rows) if not 0 <= row < available)
    if outside:
        raise UserError(
            f"{name} has rows 0 to {available - 1}, one for each class; there is no row "
            f"{_listed(outside)}"
        )
    if len(set(rows)) < len(rows):
        raise UserError(f"{name}: rows {list(rows)} name a class twice; name each class once")
    if len(rows) != wanted:
        raise UserError(
            f"{name}: {len(rows)} rows are asked for, the network to fill has {wanted} classes; "
            "give one row for each class"
        )


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
