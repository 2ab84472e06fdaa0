"""Permutation symmetries of a network, found from its graph, and alignment over them."""

from fusion.alignment.align import (
    Alignment,
    GroupAlignment,
    align,
    align_all,
    cycle_consistency,
)
from fusion.alignment.permutation import (
    apply_permutation,
    compose,
    identity_permutation,
    inverse,
    random_permutation,
)
from fusion.alignment.spec import Entry, Fixed, Group, PermutationSpec, spec_from_table
from fusion.alignment.symmetries import permutation_spec

__all__ = [
    "Alignment",
    "Entry",
    "Fixed",
    "Group",
    "GroupAlignment",
    "PermutationSpec",
    "align",
    "align_all",
    "apply_permutation",
    "compose",
    "cycle_consistency",
    "identity_permutation",
    "inverse",
    "permutation_spec",
    "random_permutation",
    "spec_from_table",
]
