"""What can be wrong with a pool, found before any work and told at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.models import find_layers
from fusion.weights import TensorSource

if TYPE_CHECKING:
    from fusion.modelpool.base import BaseModelPool

_FINITE = "weights must be finite; leave the model out or repair it"


def check_pool(pool: BaseModelPool) -> None:
    """Check every member alone, then against the base, then for weights that are not finite.

    Raises:
        UserError: names every offending model and tensor.
    """
    reference = pool.pretrained_or_first_name
    alone = {name: pool.member(name).check(name, pool) for name in pool.all_model_names}
    whole = [name for name in (reference, *pool.model_names) if not alone[name]]
    unlike: list[str] = []
    if not alone[reference]:
        base = pool.architecture(reference)
        expected, free = base.state_dict(), head_tensors(base)
        label = "the pretrained model" if pool.has_pretrained else f"'{reference}'"
        for name in whole:
            if name != reference:
                found = pool.architecture(name).state_dict()
                unlike += _of(f"expert '{name}'", _differences(found, expected, free, label))
    infinite: list[str] = []
    for name in dict.fromkeys(whole):
        source = pool.member(name).stored()
        if source is not None:
            infinite += _of(f"model '{name}'", _not_finite(source))
    _raise(
        [line for lines in alone.values() for line in lines]
        + _with_rule(unlike, "a pool's members must share one architecture up to the head")
        + _with_rule(infinite, _FINITE)
    )


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that every floating tensor of a model is finite.

    Raises:
        UserError: names the model and its offending tensors.
    """
    wrong = _of(f"model '{name}'", _not_finite(tensors))
    _raise(_with_rule(wrong, _FINITE))


def head_tensors(model: nn.Module) -> frozenset[str]:
    """Return the tensors whose shape may differ between members: those of the final layers.

    A final layer is the last one in the order of the forward pass, or one that the forward pass in
    evaluation mode does not reach (an auxiliary classifier).
    """
    try:
        layers = find_layers(model)
    except UserError:  # not traceable: the last weight that was registered is the best guess
        last = next(reversed(list(model.state_dict())), "")
        owner = last.rpartition(".")[0]
        return frozenset(key for key in model.state_dict() if key.rpartition(".")[0] == owner)
    reached = [layer for layer in layers if layer.reached]
    auxiliary = [layer for layer in layers if not layer.reached and layer.kind == "linear"]
    return frozenset(key for layer in [*reached[-1:], *auxiliary] for key in layer.tensors)


def _differences(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], free: frozenset[str], label: str
) -> list[str]:
    missing = [key for key in expected if key not in found]
    added = [key for key in found if key not in expected]
    lines = [f"lacks {', '.join(missing)}"] if missing else []
    lines += [f"has {', '.join(added)}, unknown to {label}"] if added else []
    for key, ours in expected.items():
        if key not in found:
            continue
        theirs = found[key]
        if theirs.shape != ours.shape and key not in free:
            lines.append(f"{key} is {tuple(theirs.shape)}, {label} has {tuple(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            lines.append(f"{key} is {theirs.dtype}, {label} has {ours.dtype}")
    return lines


def _not_finite(tensors: Mapping[str, Tensor] | TensorSource) -> list[str]:
    lines = []
    for key in tensors:
        tensor = tensors[key]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            lines.append(f"{key} has {bad} of {tensor.numel()} entries that are NaN or infinite")
    return lines


def _of(owner: str, lines: list[str]) -> list[str]:
    return [f"{owner}: {', '.join(lines)}"] if lines else []


def _with_rule(lines: list[str], rule: str) -> list[str]:
    return [*lines, rule] if lines else []


def _raise(lines: list[str]) -> None:
    if lines:
        raise UserError("; ".join(lines))
