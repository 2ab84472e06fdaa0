"""Normalisations: batch, instance, layer and group norm."""

from __future__ import annotations

import torch

from fusion.alignment.labels import NONE, Labels, pattern, support
from fusion.alignment.primitives import meet, normalise, per_channel, reduce
from fusion.alignment.rules.operation import Operation, Rule
from fusion.alignment.rules.reductions import squeezed


def batch_norm(op: Operation) -> tuple[Labels, ...]:
    """Normalise each channel by running statistics, or by its own (training, instances)."""
    ledger, why = op.ledger, op.why
    x = op["input"]
    others = frozenset(range(x.rank)) - {1}
    training = op["training"] or op["running_mean"] is None
    if training and "no_training" not in op.name:
        x = normalise(ledger, x, others, why)
    for name in ("running_mean", "running_var", "weight", "bias"):
        if op[name] is not None:
            x = per_channel(ledger, x, op[name], why)
    statistics = squeezed(reduce(ledger, x, others, why), others) if any(op.used[1:]) else None
    return (x, *(_of_shape(statistics, shape) for shape in op.shapes[1:]))


def _of_shape(statistics: Labels | None, shape: torch.Size) -> Labels:
    if statistics is not None and statistics.shape == shape:
        return statistics
    return Labels(shape)  # empty, or not read by anything


def layer_norm(op: Operation) -> tuple[Labels, ...]:
    """Normalise over the last axes, and scale and shift each of their positions."""
    x = op["input"]
    over = frozenset(range(x.rank - len(op["normalized_shape"]), x.rank))
    statistics = reduce(op.ledger, x, over, op.why)
    out = meet(op.ledger, x, statistics, op.why)
    for name in ("weight", "bias"):
        if op[name] is not None:
            out = meet(op.ledger, out, op[name], op.why)
    return (out, statistics, statistics)[: len(op.shapes)]


def group_norm(op: Operation) -> tuple[Labels, ...] | None:
    """Normalise over the channels and pixels of each of ``group`` blocks of channels."""
    ledger, why = op.ledger, op.why
    x, groups = op["input"], op["group"]
    if any(op.used[1:]):
        return None
    pixels = frozenset(range(2, x.rank))
    if groups == x.shape[1]:
        x = normalise(ledger, x, pixels, why)
    elif groups == 1:
        x = normalise(ledger, x, pixels | {1}, why)
    else:
        if len(x.factors) != 1 or support(x.factors[0]) != {1}:
            return None
        (atoms,) = x.factors
        if atoms.unique().numel() < atoms.numel() or bool((atoms == NONE).any()):
            return None
        ledger.colour(atoms, pattern(x.sites, frozenset((1,)), x.rank))
        ledger.partition(atoms.reshape(groups, -1))
    for name in ("weight", "bias"):
        if op[name] is not None:
            x = per_channel(ledger, x, op[name], why)
    return (x, *(Labels(shape) for shape in op.shapes[1:]))


RULES: dict[str, Rule] = {
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "_native_batch_norm_legit_functional": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "_batch_norm_no_update": batch_norm,
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
}
