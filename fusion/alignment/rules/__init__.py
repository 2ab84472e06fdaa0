"""Rules of operations: their demands on the units of their tensors, by theme.

An operation without a rule fixes every unit that it touches, which is always correct, but allows
fewer permutations.
"""

from fusion.alignment.rules import (
    contractions,
    convolutions,
    elementwise,
    joins,
    moves,
    norms,
    reductions,
    spatial,
)
from fusion.alignment.rules.operation import Operation, Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **moves.RULES,
    **joins.RULES,
    **reductions.RULES,
    **norms.RULES,
    **contractions.RULES,
    **convolutions.RULES,
    **spatial.RULES,
}

__all__ = ["RULES", "Operation", "Rule"]
