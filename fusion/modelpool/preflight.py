"""Checks of a pool before any work, with all problems reported at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.modelpool.member import Entry
from fusion.models import Head, MultiTaskNetwork
from fusion.weights import TensorSource, is_finite, tensors_of

_FINITE = "weights must be finite; leave the model out or repair it"
_SHOWN = 3  # tensors named in an error before the rest is counted


def check_entries(entries: Mapping[str, Entry]) -> list[str]:
    """Return the problems of each member alone, one sentence each.

    Raises:
        UserError: nothing here; problems are returned.
    """
    return [line for entry in entries.values() for line in entry.check()]


def check_alike(
    entries: Mapping[str, Entry], reference: str, names: Sequence[str], head: Head
) -> list[str]:
    """Return the illegal differences between members and the reference, one sentence each.

    Args:
        entries: name → member.
        reference: name of the member that the others are compared with.
        names: of the members that are compared.
        head: the tensors whose shapes may differ.
    """
    base = entries[reference].architecture()
    expected = tensors_of(base)
    label = "the pretrained model" if reference.startswith("_") else f"'{reference}'"
    lines: list[str] = []
    for name in names:
        if name == reference:
            continue
        network = entries[name].architecture()
        if isinstance(network, MultiTaskNetwork):
            return [
                f"'{name}' has a head for each of {', '.join(network.tasks)}; a pool's members "
                f"have one head each: write one task to a file of its own first"
            ]
        lines += _of(f"expert '{name}'", _differences(tensors_of(network), expected, head, label))
    return _with_rule(lines, "a pool's members must share one architecture up to the head")


def check_finite(sources: Mapping[str, Mapping[str, Tensor] | TensorSource]) -> list[str]:
    """Return which members have tensors that are not finite, one sentence each."""
    lines: list[str] = []
    for name, source in sources.items():
        lines += _of(f"model '{name}'", _not_finite(source))
    return _with_rule(lines, _FINITE)


def raise_all(lines: Collection[str]) -> None:
    """Raise one error with all problems.

    Raises:
        UserError: there is a problem.
    """
    if lines:
        raise UserError("; ".join(lines))


def _differences(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: Head, label: str
) -> list[str]:
    missing = [key for key in expected if key not in found]
    added = [key for key in found if key not in expected]
    lines = [f"lacks {_some(missing)}"] if missing else []
    lines += [f"has {_some(added)}, unknown to {label}"] if added else []
    wrong: list[str] = []
    for key, ours in expected.items():
        if key not in found:
            continue
        theirs = found[key]
        if theirs.shape != ours.shape and key not in head:
            wrong.append(f"{key} is {tuple(theirs.shape)}, {label} has {tuple(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            wrong.append(f"{key} is {theirs.dtype}, {label} has {ours.dtype}")
    return [*lines, _some(wrong)] if wrong else lines


def _not_finite(tensors: Mapping[str, Tensor] | TensorSource) -> list[str]:
    lines = []
    for key in tensors:
        tensor = tensors[key]
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            lines.append(f"{key} has {bad} of {tensor.numel()} entries that are NaN or infinite")
    return [_some(lines)] if lines else []


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _of(owner: str, lines: list[str]) -> list[str]:
    return [f"{owner}: {', '.join(lines)}"] if lines else []


def _with_rule(lines: list[str], rule: str) -> list[str]:
    return [*lines, rule] if lines else []
