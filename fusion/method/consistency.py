"""Consistency of a merged model with the directions of its experts, by task-vector arithmetic."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusion.files import write_text
from fusion.merging.members import Members
from fusion.method.base import BaseAlgorithm
from fusion.models import MultiTaskNetwork
from fusion.weights import ModuleSource, TensorSource, tensors_of
from fusion.weights.task_vectors import sum_task_vectors

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

ALL_LAYERS = "all layers"
MERGED_LAYERS = "merged layers"


@dataclass(frozen=True)
class Consistency:
    """Consistency of a merged model with its experts, over one set of tensors.

    Attributes:
        pairs: (expert A, other expert B) → cos(δ_merged − δ_B, δ_A − δ_B): 1 where the merged
            model lies from B in the direction of A. NaN where it equals B, from which it then
            lies in no direction, or where A and B are equal.
    """

    pairs: Mapping[tuple[str, str], float]

    @property
    def experts(self) -> dict[str, float]:
        """Each expert's consistency: the mean over the other experts."""
        names = dict.fromkeys(expert for expert, _ in self.pairs)
        return {
            name: _mean([value for (expert, _), value in self.pairs.items() if expert == name])
            for name in names
        }

    @property
    def mean(self) -> float:
        """The mean over all pairs."""
        return _mean(list(self.pairs.values()))


def consistency(
    merged: nn.Module,
    experts: Mapping[str, TensorSource],
    *,
    merged_tensors: Collection[str] = (),
    buffers: bool = False,
    without: Collection[str] = (),
) -> dict[str, Consistency]:
    """Compare a merged model with two experts or more, over all layers and over the merged ones.

    δ is a task vector, a model minus the base (Ilharco et al., arXiv 2212.04089); the base cancels
    in every difference of two of them, so it need not be known. Where a layer is the base's, the
    merged model points from both experts back to their common start. Over all layers, the
    consistency of a merge of few layers therefore mostly reflects the distance between the experts.
    Layers that are means of two experts by the same weights score 1 for both by construction.

    Args:
        merged: the merged model.
        experts: name → weights, two or more.
        merged_tensors: state-dict keys of the layers that were merged.
        buffers: add the running statistics to the parameters. Integer counters have no direction
            and never count: their size alone would decide the cosine.
        without: state-dict keys that are excluded, such as those of a head.

    Returns:
        ``"all layers"`` and, if some were merged, ``"merged layers"`` → consistency. Empty for
        fewer than two experts, or without a tensor in common.
    """
    common = common_tensors(merged, experts, buffers=buffers)
    names = [name for name in common if name not in without]
    if len(experts) < 2 or not names:
        return {}
    scopes = {ALL_LAYERS: list(range(len(names)))}
    inside = [index for index, name in enumerate(names) if name in merged_tensors]
    if inside:
        scopes[MERGED_LAYERS] = inside
    pairs: dict[str, dict[tuple[str, str], float]] = {scope: {} for scope in scopes}
    for other, origin in experts.items():
        rest = [name for name in experts if name != other]
        vectors = [ModuleSource(merged), *(experts[name] for name in rest)]
        sums = sum_task_vectors(origin, vectors, names)
        for scope, indices in scopes.items():
            cosines = sums.total(indices).cosines[0, 0, 1:].tolist()
            pairs[scope] |= {(name, other): cos for name, cos in zip(rest, cosines, strict=True)}
    ordered = [(a, b) for a in experts for b in experts if a != b]
    return {
        scope: Consistency({pair: found[pair] for pair in ordered})
        for scope, found in pairs.items()
    }


def write_consistency(
    algorithm: BaseAlgorithm,
    merged: nn.Module,
    members: Members,
    *,
    merged_tensors: Collection[str],
) -> None:
    """Write the consistency of a merge with its experts to report, log and ``consistency.csv``.

    Of a network of several tasks the body is compared, which all tasks share.
    """
    network = merged.for_task(merged.tasks[0]) if isinstance(merged, MultiTaskNetwork) else merged
    own = members.head.tensors if isinstance(merged, MultiTaskNetwork) else ()
    found = consistency(network, members.experts, merged_tensors=merged_tensors, without=own)
    if not found:
        return
    algorithm.report["consistency"] = consistency_report(found)
    told = ", ".join(f"{scope} {values.mean:.3f}" for scope, values in found.items())
    log.info("Consistency with the experts: %s", told)
    if algorithm.output_path is not None and algorithm.fabric.is_global_zero:
        table = consistency_table(found).to_csv(index=False)
        write_text(algorithm.output_path / "consistency.csv", table)


def common_tensors(
    model: nn.Module, experts: Mapping[str, TensorSource], *, buffers: bool
) -> list[str]:
    """Return the floating-point tensors that all have in one shape, which excludes differing heads.

    Parameters only, unless ``buffers``. Shared tensors count once.
    """
    named = dict(model.named_parameters())
    state = tensors_of(model)
    if buffers:
        named |= {name: value for name, value in model.named_buffers() if name in state}  # type: ignore[misc]
    return [
        name
        for name, tensor in named.items()
        if tensor.is_floating_point()
        and all(
            name in source and torch.Size(source.info(name).shape) == tensor.shape
            for source in experts.values()
        )
    ]


def consistency_table(found: Mapping[str, Consistency]) -> pd.DataFrame:
    """Return one row for each scope and pair: ``scope``, ``expert``, ``other``, ``consistency``.

    Rows whose ``other`` is empty are means: each expert's, and without ``expert`` that of all.
    """
    import pandas as pd

    rows: list[tuple[str, str, str, float]] = []
    for scope, values in found.items():
        rows += [(scope, a, b, value) for (a, b), value in values.pairs.items()]
        rows += [(scope, name, "", value) for name, value in values.experts.items()]
        rows.append((scope, "", "", values.mean))
    return pd.DataFrame(rows, columns=["scope", "expert", "other", "consistency"])


def consistency_report(found: Mapping[str, Consistency]) -> dict[str, Any]:
    """Return scope → expert and ``mean`` → consistency, in plain values; None is no direction."""
    return {
        scope: {
            "experts": {name: _or_none(value) for name, value in values.experts.items()},
            "mean": _or_none(values.mean),
        }
        for scope, values in found.items()
    }


def _mean(values: list[float]) -> float:
    """Return the mean of those that are numbers; NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
