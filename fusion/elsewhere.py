"""Names of methods and options in other projects, for hints in messages."""

from __future__ import annotations

from collections.abc import Iterable

from fusion.errors import suggestion

METHODS = {
    "average": "simple_average",
    "fisher": "fisher_merging",
    "mean": "simple_average",
    "rebasin": "git_rebasin",
    "regression": "regmean",
    "soup": "simple_average",
    "ties": "ties_merging",
    "tsv": "task_singular_vectors",
    "tsvm": "task_singular_vectors",
    "weighted": "weighted_average",
}
"""Short names and names of papers."""

OPTIONS = {
    "scaling_factor": "scale",
    "scaling_coefficient": "scale",
    "threshold": "density",
    "weight": "weights",
}
"""Options of FusionBench and mergekit."""


def choice_hint(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice equivalent to ``name``, or ``""``."""
    known = list(known)
    ours = METHODS.get(name)
    return f"; did you mean '{ours}'?" if ours in known else suggestion(name, known)
