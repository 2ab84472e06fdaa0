"""Products of matrices, as in linear layers, `einsum` and attention."""

from __future__ import annotations

from collections.abc import Sequence

from fusion.alignment.labels import Labels, made
from fusion.alignment.ledger import Ledger
from fusion.alignment.primitives import contract, meet
from fusion.alignment.rules.operation import Operation, Rule
from fusion.alignment.rules.reductions import squeezed


def product(ledger: Ledger, a: Labels, b: Labels, why: str) -> Labels:
    """Multiply (…, m, k) by (…, k, n) with the same leading axes."""
    batch = frozenset(range(a.rank - 2))
    last = a.rank
    b = b.changed(lambda part: part.transpose(-1, -2))
    out = contract(ledger, inserted(a, last - 1), inserted(b, last - 2), last, why, batch)
    return squeezed(out, frozenset((last,)))


def inserted(x: Labels, axis: int) -> Labels:
    """Return the same with an axis of length 1 before ``axis``."""

    def change(shape: Sequence[int]) -> list[int]:
        return [*shape[:axis], 1, *shape[axis:]]

    return made(
        change(x.shape),
        [part.reshape(change(part.shape)) for part in x.factors],
        [part.reshape(change(part.shape)) for part in x.sites],
        x.cause,
    )


def matrices(op: Operation) -> Labels:
    """Multiply two matrices, or batches of them."""
    return product(op.ledger, op["self"], op["mat2"], op.why)


def added(op: Operation) -> Labels:
    """Multiply two matrices, or batches of them, and add a third."""
    names = ("batch1", "batch2") if op.name == "baddbmm" else ("mat1", "mat2")
    out = product(op.ledger, op[names[0]], op[names[1]], op.why)
    return meet(op.ledger, out, op["self"], op.why)


def matrix_and_vector(op: Operation) -> Labels:
    """Multiply a matrix by a vector, and perhaps add another."""
    a, b = (op["self"], op["vec"]) if op.name == "mv" else (op["mat"], op["vec"])
    out = squeezed(product(op.ledger, a, inserted(b, 1), op.why), frozenset((1,)))
    return out if op.name == "mv" else meet(op.ledger, out, op["self"], op.why)


def vectors(op: Operation) -> Labels:
    """Multiply two vectors and sum."""
    a, b = op.labels()
    out = product(op.ledger, inserted(a, 0), inserted(b, 1), op.why)
    return squeezed(out, frozenset((0, 1)))


def linear(op: Operation) -> Labels:
    """Multiply (…, n_in) by the transposed weight (n_out, n_in) and add the bias."""
    x, weight = op["input"], op["weight"]
    rank = x.rank
    weight = weight.lifted(rank + 1)
    out = squeezed(
        contract(op.ledger, inserted(x, rank - 1), weight, rank, op.why), frozenset((rank,))
    )
    return out if op["bias"] is None else meet(op.ledger, out, op["bias"], op.why)


RULES: dict[str, Rule] = {
    "mm": matrices,
    "bmm": matrices,
    "addmm": added,
    "baddbmm": added,
    "mv": matrix_and_vector,
    "addmv": matrix_and_vector,
    "dot": vectors,
    "vdot": vectors,
    "linear": linear,
}
