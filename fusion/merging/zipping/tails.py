"""Readout of a trunk's merged features for the tail of one expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.alignment import PermutationSpec
from fusion.alignment.permutation import permute_tensor
from fusion.merging.zipping.applying import Readers, Roles, unmerge_matrix
from fusion.models.cut import Cut, reader_key


def readers_of(
    cut: Cut,
    own: Mapping[str, Tensor],
    spec: PermutationSpec,
    shared: PermutationSpec,
    readers: Readers,
    roles: Roles,
    order: Mapping[str, Tensor],
    *,
    dense: bool,
) -> dict[str, Tensor]:
    """Return the tensors of a :class:`~fusion.models.CutNetwork` that read features at its cut.

    Args:
        cut: where the network is cut.
        own: the expert's tensors.
        spec: all groups of the network.
        shared: the groups in the trunk.
        readers: group → unmerge matrix of the expert, of units in ``order``.
        roles: of the tensors' axes.
        order: the permutation of every group that was applied to the expert first, if any.
        dense: whether features are read by a matrix, else each from one merged feature.
    """
    found = {}
    for number, one in enumerate(one for one in cut.crossings if one.source):
        key = _channel_key(one.source, own, roles)
        matrix = unmerge_matrix(key, shared, readers, roles, one.channels)
        axis = roles.outputs.get(key, 0)
        matrix = _in_own_order(matrix, key, own[key], axis, spec, order)
        read = matrix.to(own[key].dtype) if dense else matrix.argmax(1)
        found[reader_key(number, dense=dense)] = read
    return found


def _channel_key(source: str, state: Mapping[str, Tensor], roles: Roles) -> str:
    """Return a tensor that has an axis of the channels of a norm or layer."""
    for name in ("weight", "running_mean"):
        if f"{source}.{name}" in state:
            return f"{source}.{name}"
    return next(key for key in roles.outputs if key.startswith(f"{source}."))


def _in_own_order(
    matrix: Tensor,
    key: str,
    tensor: Tensor,
    axis: int,
    spec: PermutationSpec,
    order: Mapping[str, Tensor],
) -> Tensor:
    """Return a map to permuted channels as a map to the channels as the expert has them."""
    parts = [
        (group, entry, order[group.name])
        for group, entry in spec.by_tensor.get(key, ())
        if group.name in order
    ]
    if not parts:
        return matrix
    shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
    numbers = torch.arange(len(matrix)).view(shape).expand(tensor.shape).clone()
    at = permute_tensor(numbers, key, parts).movedim(axis, 0).reshape(len(matrix), -1)[:, 0]
    result = torch.empty_like(matrix)
    result[at] = matrix
    return result
