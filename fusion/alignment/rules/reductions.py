"""Sums, means, extrema and norms over axes, and divisions by them."""

from __future__ import annotations

from typing import Any

from fusion.alignment.labels import Axes, Labels, made
from fusion.alignment.primitives import meet, normalise, reduce
from fusion.alignment.rules.operation import Operation, Rule

REDUCTIONS = frozenset((
    "all", "amax", "amin", "aminmax", "any", "linalg_vector_norm", "logsumexp", "max", "mean",
    "min", "norm", "prod", "std", "std_mean", "sum", "var", "var_mean",
))  # fmt: skip
BY_POSITION = frozenset(("argmax", "argmin"))  # return the place, which moves


def reduction(op: Operation) -> tuple[Labels, ...] | None:
    """Combine along axes: over pixels the units stay, over channels they vanish."""
    x = op["self"]
    over = _axes(x, op["dim"])
    if op.name in BY_POSITION or (op.name in ("max", "min") and len(op.shapes) > 1):
        told = op.used[-1] if len(op.shapes) > 1 else True
        if told and any(part.shape[axis] > 1 for part in x.factors for axis in over):
            return None
    result = reduce(op.ledger, x, over, op.why)
    return tuple(result if len(shape) == x.rank else squeezed(result, over) for shape in op.shapes)


def share(op: Operation) -> Labels:
    """Divide by a sum: neither it nor the quotient depends on the order of its terms."""
    x = op["self"]
    return normalise(op.ledger, x, _axes(x, op["dim"]), op.why)


def weight_norm(op: Operation) -> tuple[Labels, ...]:
    """Scale ``v`` to the norms ``g``, over all axes but ``dim`` (Salimans and Kingma, 2016)."""
    v, g = op["v"], op["g"]
    over = frozenset(range(v.rank)) - {v.axis(op["dim"])}
    norms = meet(op.ledger, reduce(op.ledger, v, over, op.why), g, op.why)
    return meet(op.ledger, v, norms, op.why), norms


def squeezed(x: Labels, axes: Axes) -> Labels:
    """Return the same without the axes ``axes``, of length 1."""
    keep = [a for a in range(x.rank) if a not in axes]
    return made(
        [x.shape[a] for a in keep],
        [part.reshape([part.shape[a] for a in keep]) for part in x.factors],
        [part.reshape([part.shape[a] for a in keep]) for part in x.sites],
        x.cause,
    )


def _axes(x: Labels, dim: Any) -> Axes:
    if not x.rank or dim is None or (isinstance(dim, list | tuple) and not dim):
        return frozenset(range(x.rank))
    return x.axes(dim)


RULES: dict[str, Rule] = {
    **dict.fromkeys((*REDUCTIONS, *BY_POSITION), reduction),
    "_softmax": share,
    "_log_softmax": share,
    "_safe_softmax": share,
    "_weight_norm_interface": weight_norm,
}
