"""The mean of several networks, and what is done about its batch norm."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fusion.errors import UserError
from fusion.method import batch_norm as bn
from fusion.modelpool import BaseModelPool
from fusion.training import repair
from fusion.weights import spherical_mean, weighted_mean

if TYPE_CHECKING:
    from lightning.fabric import Fabric

INTERPOLATIONS = ("lerp", "slerp")
TREATMENTS = ("pretrained", "merge", "interpolate", "recalibrate", "repair", "auto")


def mean_network(
    like: nn.Module,
    members: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    interpolation: str = "lerp",
    statistics: str = "merge",
) -> nn.Module:
    """Return a copy of ``like`` that holds the mean of the members' tensors.

    A tensor of which the members' shapes differ from ``like``'s (a head) stays ``like``'s, and so
    do integer buffers, which have no mean.

    Args:
        like: a network of the members' architecture.
        members: their state dicts.
        weights: of the members; only their ratios count. Equal ones by default.
        interpolation: ``lerp`` (weighted mean) or ``slerp`` (on the sphere), tensor by tensor.
        statistics: batch norm's running statistics: ``merge`` (those of the mixture: for members
            that saw different data), ``interpolate`` (the weighted mean, as of any tensor) or
            ``pretrained`` (those of ``like``).
    """
    mean = spherical_mean if interpolation == "slerp" else weighted_mean
    weights = [1.0] * len(members) if weights is None else weights
    result = copy.deepcopy(like)
    state = result.state_dict()
    pairs = [
        pair
        for pair in bn.statistics_keys(result)
        if all(member[key].shape == state[key].shape for member in members for key in pair)
    ]
    kept = {key for pair in pairs for key in pair}
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state
        fits = all(member[key].shape == tensor.shape for member in members)
        if key not in kept and fits and tensor.is_floating_point():
            tensors = [bn.working(member[key]) for member in members]
            merged[key] = mean(tensors, weights).to(tensor.dtype)
    if statistics == "merge":
        for pair in pairs:
            merged |= bn.merged_statistics(state, pair, members, weights)
    elif statistics == "interpolate":
        for key in kept:
            mixed = weighted_mean([bn.working(member[key]) for member in members], weights)
            merged[key] = mixed.to(state[key].dtype)
    result.load_state_dict({**state, **merged})
    return result


def check_treatment(treatment: str, modelpool: BaseModelPool, model: nn.Module) -> str:
    """Return what ``treatment`` of batch norm stands for here; REPAIR needs no batch norm.

    ``auto`` recalibrates where the pool has training data, else interpolates: midway between
    networks trained apart that was better than the mixture's statistics on every pair tried.

    Raises:
        UserError: it needs training data, and the pool has none.
    """
    if treatment == "auto" and not modelpool.train_dataset_names:
        treatment = "interpolate"
    if treatment != "repair":
        return bn.chosen_treatment(treatment, modelpool, model)
    if not modelpool.train_dataset_names:
        raise UserError(
            "batch_norm=repair needs images, and the pool has no train_datasets; add them, or "
            "choose batch_norm=interpolate, merge or pretrained"
        )
    return treatment


def treat(
    model: nn.Module,
    treatment: str,
    modelpool: BaseModelPool,
    fabric: Fabric,
    *,
    members: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    images: int,
    batch_size: int,
    seed: int,
) -> nn.Module:
    """Recalibrate or repair a mean network on the pool's training data, in place.

    Args:
        model: the mean of ``members``, with running statistics of some kind.
        treatment: ``recalibrate`` or ``repair``; anything else leaves it as it is.
        modelpool: has the images.
        fabric: where to compute.
        members: the networks that it is the mean of, aligned; only REPAIR looks at them.
        weights: of the members in the mean.
        images: how many are looked at, at most.
        batch_size: images per forward pass.
        seed: of the sample.
    """
    if treatment == "recalibrate":
        return bn.recalibrate(
            model, modelpool, fabric, images=images, batch_size=batch_size, seed=seed
        )
    if treatment == "repair":
        repair(
            model,
            members,
            modelpool.calibration_dataset(),  # type: ignore[arg-type]
            weights=weights,
            images=images,
            batch_size=batch_size,
            seed=seed,
            device=fabric.device,
        )
    return model
