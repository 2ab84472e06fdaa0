"""Layer scores by which a selective merge ranks layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fusion.data import seed_from
from fusion.models import Layer
from fusion.spectrum import LayerSNR

Ranking = Literal["pretrained", "experts", "task_vector", "similarity", "hybrid", "norm", "random"]
SIMILARITY_WEIGHT = 1.7  # the notebook's choice in its hybrid score; kept for comparison only


@dataclass
class LayerRecord:
    """All scores of one layer of a pool.

    Attributes:
        layer: the layer.
        shape: of its weight in the base.
        is_head: whether a member's weight has another shape, so that the layer cannot be merged.
        snr: member → result of the noise model for its weight.
        task_vector_snr: mean over the experts of the SNR of (expert − base); NaN for a head, and if
            not requested.
        similarity: mean cosine over pairs of experts of their changes to the layer; NaN for a
            head, with fewer than two experts, or where an expert did not change the layer.
        relative_change: mean over the experts of ‖expert − base‖ / ‖base‖; NaN for a head.
        score: the score by which the layer is ranked.
        rank: its place, 1 the best; None for a layer that is not a candidate.
        selected: whether it is merged.
        weights: expert → its share in the merge.
    """

    layer: Layer
    shape: tuple[int, ...]
    is_head: bool = False
    snr: dict[str, LayerSNR] = field(default_factory=dict)
    task_vector_snr: float = math.nan
    similarity: float = math.nan
    relative_change: float = math.nan
    score: float = math.nan
    rank: int | None = None
    selected: bool = False
    weights: dict[str, float] = field(default_factory=dict)


def weight_matrix(weight: Tensor, layer: Layer) -> Tensor:
    """Return the weight with its output units first, as the noise model expects it.

    A transposed convolution holds (in, out/groups, kh, kw). With groups, its blocks lie along the
    input axis and are scored in that layout.
    """
    if layer.kind == "conv_transpose" and layer.groups == 1:
        return weight.transpose(0, 1)
    return weight


def change_statistics(base: Tensor, experts: Sequence[Tensor]) -> tuple[float, float]:
    """Return the mean pairwise cosine of the changes, and their mean size relative to the base.

    Args:
        base: all parameters of a layer as one float64 vector (n,).
        experts: the same of each expert.
    """
    changes = torch.stack([expert - base for expert in experts])
    norms = changes.norm(dim=1)
    size = base.norm()
    relative = float(norms.mean() / size) if size > 0 else math.nan
    if len(experts) < 2 or not bool((norms > 0).all()):
        return math.nan, relative
    unit = changes / norms[:, None]
    cosines = unit @ unit.T
    above = torch.triu_indices(len(experts), len(experts), offset=1)
    return float(cosines[above[0], above[1]].mean().clamp(-1, 1)), relative


def score_layers(
    records: Sequence[LayerRecord], rank_by: str, *, base: str, experts: Sequence[str], seed: int
) -> None:
    """Fill in ``score`` of every candidate by one of ``Ranking``."""
    candidates = [record for record in records if not record.is_head]
    snr = {r.layer.name: _mean([r.snr[name].snr for name in experts]) for r in candidates}
    if rank_by == "hybrid":
        scaled_snr = _unit_range(snr)
        similar = _unit_range({r.layer.name: r.similarity for r in candidates})
    for record in candidates:
        name = record.layer.name
        match rank_by:
            case "pretrained":
                record.score = record.snr[base].snr
            case "experts":
                record.score = snr[name]
            case "task_vector":
                record.score = record.task_vector_snr
            case "similarity":
                record.score = record.similarity
            case "hybrid":
                record.score = scaled_snr[name] + SIMILARITY_WEIGHT * similar[name]
            case "norm":
                record.score = record.relative_change
            case "random":
                record.score = float(seed_from(seed, name))


def select_top(records: Sequence[LayerRecord], top_p: float) -> None:
    """Rank the candidates and select the best ceil(top_p·L) of them.

    Among equals the earlier layer comes first; a score that is not a number comes last.
    """
    candidates = [record for record in records if not record.is_head]
    worst = -math.inf
    order = sorted(
        candidates, key=lambda r: worst if math.isnan(r.score) else r.score, reverse=True
    )
    _mark(order, share_count(top_p, len(candidates)))


def select_top_ascending(records: Sequence[LayerRecord], top_p: float) -> None:
    """Select as :func:`select_top`, with ties as the notebook's stable ascending sort leaves them.

    There the selected layers are the *last* of that order: among equals the later layer wins.
    """
    candidates = [record for record in records if not record.is_head]
    order = sorted(candidates, key=lambda r: r.score)[::-1]
    _mark(order, share_count(top_p, len(candidates)))


def select_named(records: Sequence[LayerRecord], names: Sequence[str]) -> None:
    """Select the layers called ``names``, all of them candidates."""
    wanted = set(names)
    for record in records:
        record.selected = record.layer.name in wanted


def share_count(top_p: float, layers: int) -> int:
    """Return ceil(top_p·layers), robust to the rounding of the product (0.1 · 30 is 3, not 4)."""
    return min(layers, math.ceil(round(top_p * layers, 9)))


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Return ``weights`` divided by their sum; equal ones where all are 0."""
    total = math.fsum(weights.values())
    if total == 0:
        return {name: 1 / len(weights) for name in weights}
    return {name: weight / total for name, weight in weights.items()}


def _mark(order: Sequence[LayerRecord], count: int) -> None:
    for place, record in enumerate(order):
        record.rank = place + 1
        record.selected = place < count


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _unit_range(values: Mapping[str, float]) -> dict[str, float]:
    """Scale to [0, 1]; all 0 where there is no range. NaN stays NaN."""
    known = [value for value in values.values() if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low
    return {name: (value - low) / span if span else 0.0 for name, value in values.items()}
