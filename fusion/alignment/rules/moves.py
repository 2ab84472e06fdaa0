"""Operations that only move data, applied to the labels as to the data."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion.alignment.labels import Labels, made, support
from fusion.alignment.ledger import Ledger
from fusion.alignment.primitives import combined, demote
from fusion.alignment.rules.operation import Operation, Rule

VIEWS = frozenset(("_reshape_alias", "_unsafe_view", "reshape", "view", "view_copy"))
# In these, every element of the argument occurs once in the result.
REARRANGEMENTS = frozenset((
    "channel_shuffle", "flip", "native_channel_shuffle", "permute", "pixel_shuffle",
    "pixel_unshuffle", "roll", "squeeze", "t", "transpose", "unsqueeze",
))  # fmt: skip
SELECTIONS = frozenset((
    "constant_pad_nd", "diagonal", "expand", "im2col", "index", "index_select", "narrow",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "select", "slice", "split", "split_with_sizes",
    "tril", "triu", "unbind", "unfold", "unsafe_chunk", "unsafe_split",
    "unsafe_split_with_sizes",
))  # fmt: skip
# These put a constant where nothing moves to.
FILLED = frozenset(("constant_pad_nd", "im2col", "tril", "triu"))
FLOATING = frozenset((  # not defined on integers
    "channel_shuffle", "im2col", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle",
))  # fmt: skip


def view(op: Operation) -> Labels:
    """Arrange the same elements in another shape."""
    x: Labels = op["self"] if op["self"] is not None else op["input"]
    return x.viewed(op.shape)


def move(op: Operation) -> tuple[Labels, ...] | None:
    """Select, repeat and rearrange elements."""
    if len(op.labels()) > 1:
        return None  # an index that is itself computed
    (x,) = op.labels()
    factors = [_run(op, x, part) for part in x.factors]
    sites = [_run(op, x, part) for part in x.sites]
    if op.name in FILLED:
        # Filled elements have a separate site, and so may belong to any unit.
        (moved,) = _run(op, x, torch.ones((), dtype=torch.int64))
        factors = [[_without_gaps(part, moved)] for (part,) in factors]
        sites = [[_without_gaps(part, moved)] for (part,) in sites]
        sites.append([moved])
    out = [
        made(shape, [part[i] for part in factors], [part[i] for part in sites], x.cause)
        for i, shape in enumerate(op.shapes)
    ]
    if op.name in REARRANGEMENTS:
        return tuple(out)
    return tuple(complete(op.ledger, one, op.why) for one in out)


def restrided(op: Operation) -> Labels | None:
    """Read elements by their place in memory."""
    x, (strides, start) = op["self"], op.strides
    place = sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
    memory = torch.full((place + 1,), -1)
    numbers = torch.arange(x.shape.numel()).view(x.shape)
    memory.as_strided(x.shape, strides).copy_(numbers)
    offset = start if op["storage_offset"] is None else op["storage_offset"]
    last = sum((n - 1) * step for n, step in zip(op["size"], op["stride"], strict=True))
    if offset < start or offset - start + last > place:
        return None  # outside of the tensor
    read = memory.as_strided(op["size"], op["stride"], offset - start)
    whole = torch.equal(memory.as_strided(x.shape, strides), numbers)
    if not whole or bool((read < 0).any()):
        return None
    flat = x.viewed([-1])
    return complete(op.ledger, flat.changed(lambda part: part[read], op.shape), op.why)


def _run(op: Operation, x: Labels, part: Tensor) -> list[Tensor]:
    floating = op.name in FLOATING or op.name.endswith(("_pad1d", "_pad2d", "_pad3d"))
    part = part.expand(x.shape).to(torch.float64 if floating else torch.int64)
    arguments = {key: part if value is x else value for key, value in op.arguments.items()}
    if op.name == "constant_pad_nd":
        arguments["value"] = 0
    result = op.run(**arguments)
    return [one.long() for one in ([result] if isinstance(result, Tensor) else result)]


def _without_gaps(part: Tensor, moved: Tensor) -> Tensor:
    """Return labels that agree with ``part`` where something was moved, and change little."""
    for axis, size in enumerate(part.shape):
        if size > 1:
            largest = part.amax(axis, keepdim=True)
            if bool(((part == largest) | (moved == 0)).all()):
                part, moved = largest, moved.amax(axis, keepdim=True)
    return part


def complete(ledger: Ledger, x: Labels, why: str) -> Labels:
    """Make sure that factors that change along one axis occur there in all combinations.

    They do after a flatten, but not where some elements of that were selected (a diagonal).
    """
    for i, g in enumerate(x.factors):
        for f in x.factors[:i]:
            if support(f) & support(g) and not combined(ledger, f, g):
                return complete(ledger, demote(ledger, x, g, why), why)
    return x


RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, view),
    "as_strided": restrided,
    **dict.fromkeys(REARRANGEMENTS | SELECTIONS, move),
}
