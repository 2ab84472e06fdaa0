"""The mean of several networks of one architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fusion.merging.batch_norm import merged_statistics, statistics_keys
from fusion.weights import load_tensors, tensors_of, weighted_mean, widened


def mean_network(
    like: nn.Module,
    members: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    statistics: str = "merge",
) -> nn.Module:
    """Return a copy of ``like`` with the mean of the members' tensors.

    Tensors whose shapes in the members differ from ``like``'s (a head) are kept from ``like``, and
    so are integer buffers, which have no mean.

    Args:
        like: a network of the members' architecture.
        members: their state dicts.
        weights: of the members; only their ratios count. Equal ones by default.
        statistics: batch norm's running statistics: ``merge`` (those of the mixture: for members
            that saw different data), ``interpolate`` (the weighted mean, as of any tensor) or
            ``pretrained`` (those of ``like``).
    """
    weights = [1.0] * len(members) if weights is None else weights
    result = copy.deepcopy(like)
    state = tensors_of(result)
    fitting = {
        key: tensor
        for key, tensor in state.items()
        if tensor.is_floating_point()
        and all(member[key].shape == tensor.shape for member in members)
    }
    merged: dict[str, Tensor] = {}
    for pair in statistics_keys(result):
        if statistics == "pretrained":
            merged |= {key: state[key] for key in pair}
        elif fitting.keys() >= set(pair):
            merged |= merged_statistics(pair, members, weights, kind=statistics)
    for key in fitting:
        if key not in merged:
            merged[key] = weighted_mean([widened(member[key]) for member in members], weights)
    load_tensors(result, merged)
    return result
