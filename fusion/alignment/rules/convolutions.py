"""Convolution of any kind: sums over the channels of a group and the positions of a kernel."""

from __future__ import annotations

import torch

from fusion.alignment.labels import Labels, fibres, made, pattern, support
from fusion.alignment.ledger import Ledger
from fusion.alignment.primitives import (
    SILENT,
    confine,
    contract,
    demote,
    distinct_atoms,
    meet,
    per_channel,
    spread,
)
from fusion.alignment.rules.operation import Operation, Rule


def convolution(op: Operation) -> Labels | None:
    """Make channels from those of a group; transposed and depthwise convolution alike."""
    ledger, why = op.ledger, op.why
    x, weight, groups, transposed = op["input"], op["weight"], op["groups"], op["transposed"]
    if x.rank != weight.rank:
        return None
    pixels = frozenset(range(2, x.rank))
    x = _whole(confine(ledger, x, pixels, f"{why} along the channels"))
    weight = _whole(confine(ledger, weight, pixels, SILENT))
    out: Labels | None
    if groups == 1:
        out = _dense(ledger, x, weight, why, transposed=transposed)
    elif tuple(weight.shape) == (groups, 1):  # depthwise: a filter for each channel
        out = meet(ledger, weight.viewed([1, groups]), x, why)
    else:
        out = _grouped(ledger, x, weight, groups, why, transposed=transposed)
    if out is None:
        return None
    out = out.viewed([*out.shape, *[1] * len(pixels)])
    out = spread(ledger, out, pixels, op.shape, why)
    return out if op["bias"] is None else per_channel(ledger, out, op["bias"], why)


def _whole(x: Labels) -> Labels:
    """Return labels of the first two axes, which summarise a whole image or kernel."""
    pixels = frozenset(range(2, x.rank))
    shape = [*x.shape[:2], *[1] * len(pixels)]
    return made(shape, x.factors, fibres(x.sites, pixels), x.cause).viewed(x.shape[:2])


def _dense(ledger: Ledger, x: Labels, weight: Labels, why: str, *, transposed: bool) -> Labels:
    if transposed:
        weight = weight.changed(lambda part: part.transpose(0, 1))
    (images, taken), channels = x.shape, weight.shape[0]
    x, weight = x.viewed([images, 1, taken]), weight.viewed([1, channels, taken])
    return contract(ledger, x, weight, 2, why).viewed([images, channels])


def _grouped(
    ledger: Ledger, x: Labels, weight: Labels, groups: int, why: str, *, transposed: bool
) -> Labels | None:
    """Make a group of channels from each group: blocks that move as a whole."""
    filters = weight.viewed([groups, -1, weight.shape[1]])  # (groups, rows of a group, columns)
    none = torch.zeros(1, 1, dtype=torch.int64)
    rows = columns = none
    for factor in weight.factors:
        if support(factor) == {0} and distinct_atoms(factor):
            rows = factor.view(groups, -1)
        else:
            by_row = factor.expand(weight.shape).reshape(filters.shape)
            columns = by_row[:, 0]
            if len(weight.factors) > 2 or not bool((by_row == columns[:, None]).all()):
                return None  # each row has separate columns
    taken_axis, made_axis = (1, 2) if transposed else (2, 1)
    taken, channels = (rows, columns) if transposed else (columns, rows)
    if not distinct_atoms(channels):
        return None
    for factor in x.factors:
        if 0 in support(factor):
            x = demote(ledger, x, factor, why)
    line = [groups, filters.shape[taken_axis]]
    places = pattern(filters.sites, frozenset((0, taken_axis)), 3).squeeze(made_axis)
    channel = pattern(x.sites, frozenset((1,)), 2)
    met = meet(
        ledger,
        made(line, [taken], [places], weight.cause),
        made([1, x.shape[1]], x.factors, [channel], x.cause).viewed(line),
        why,
    )
    if len(met.factors) > 1:
        return None
    held = met.factors[0] if met.factors else none
    ledger.partition(held.expand(line), channels)
    places = pattern(filters.sites, frozenset((0, made_axis)), 3).squeeze(taken_axis)
    ledger.colour(channels, places)
    sites = [*fibres(x.sites, frozenset((1,))), places.expand(channels.shape).reshape(1, -1)]
    return made([x.shape[0], channels.numel()], [channels.reshape(1, -1)], sites, x.cause)


RULES: dict[str, Rule] = {"convolution": convolution}
