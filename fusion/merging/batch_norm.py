"""Treatments of batch-norm statistics when networks are merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.options import SampleSize, Seed, checked
from fusion.training import MemberStatistics, channel_statistics, recalibrate_batch_norm, repair
from fusion.weights import weighted_mean, widened

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Treatment = Literal[
    "pretrained",
    "merge",
    "interpolate",
    "grams",
    "recalibrate",
    "recalibrate_per_task",
    "repair",
    "auto",
]
_WITH_IMAGES = ("recalibrate", "recalibrate_per_task", "repair")
WITHOUT_IMAGES = ("pretrained", "merge", "interpolate")


@checked
@dataclass(frozen=True)
class Calibration:
    """The sample of unlabelled training images that a network is measured on.

    Attributes:
        images: maximum number of images.
        batch_size: images per forward pass.
        seed: of the draw.

    Raises:
        UserError: fewer than two images, which have no variance.
    """

    images: SampleSize = 2000
    batch_size: SampleSize = 128
    seed: Seed = 0


def chosen_treatment(
    treatment: str, modelpool: BaseModelPool, model: nn.Module, *, without_images: str
) -> str:
    """Resolve ``auto``, and check that the choice is possible.

    ``auto`` recalibrates where the pool has training data, and takes the cards' Gram matrices where
    every expert has a card. A network without running statistics is not treated, except by REPAIR,
    which needs no batch norm.

    Args:
        treatment: one of ``Treatment``.
        modelpool: may have training data.
        model: the architecture.
        without_images: the choice of ``auto`` in a pool without training data and cards.

    Raises:
        UserError: the treatment needs images, and the pool has no training data.
    """
    has_images = modelpool.has_data("train")
    uses_images = treatment in _WITH_IMAGES and (treatment == "repair" or statistics_keys(model))
    if uses_images and not has_images:
        lacking = [n for n in modelpool.model_names if not modelpool.has_data("train", n)]
        others = "grams, merge" if modelpool.has_card() else "interpolate, merge"
        only = " but cards" if any(map(modelpool.has_card, lacking)) else ""
        raise UserError(
            f"batch_norm={treatment} needs training images of every expert, and the pool has none "
            f"of {', '.join(lacking)}{only}; add them to train_datasets, or choose "
            f"batch_norm={others} or pretrained"
        )
    if not statistics_keys(model) and treatment != "repair":
        return "pretrained"
    if treatment == "auto":
        without = "grams" if modelpool.has_card() else without_images
        return "recalibrate" if has_images else without
    return treatment


def statistics_keys(
    model: nn.Module, norms: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Return the keys (running mean, running variance) of every norm that has them.

    These are batch norms, and instance norms that track running statistics.

    Args:
        model: the network.
        norms: names of the norm modules to include; all by default.
    """
    return [
        (f"{name}.running_mean", f"{name}.running_var")
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        and module.running_mean is not None
        and (norms is None or name in norms)
    ]


def mixture_statistics(
    means: Sequence[Tensor], variances: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    r"""Return mean and variance of a mixture.

    .. math::
        \mu = \sum_i w_i \mu_i, \qquad
        \sigma^2 = \sum_i w_i \sigma_i^2 + \sum_i w_i (\mu_i - \mu)^2

    The variance is computed as the mean of the variances plus the variance of the means, which
    never cancels.

    Args:
        means: of each component, (C,).
        variances: of each component, (C,).
        weights: of each component; they are divided by their sum.
    """
    mean = weighted_mean(means, weights)
    between = [(component.double() - mean.double()).square() for component in means]
    within = [variance.double() for variance in variances]
    spread = [inside + outside for inside, outside in zip(within, between, strict=True)]
    return mean, weighted_mean(spread, weights).to(variances[0].dtype)


def merged_statistics(
    keys: tuple[str, str],
    experts: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    *,
    kind: str = "merge",
) -> dict[str, Tensor]:
    """Return the running statistics of one norm, computed from the experts'.

    Args:
        keys: of running mean and running variance.
        experts: the experts' state dicts.
        weights: of the experts.
        kind: ``merge`` (those of the mixture: for experts that saw different data) or
            ``interpolate`` (the weighted mean, as of any tensor).
    """
    mean_key, variance_key = keys
    means = [widened(expert[mean_key]) for expert in experts]
    variances = [widened(expert[variance_key]) for expert in experts]
    if kind == "interpolate":
        mean, variance = weighted_mean(means, weights), weighted_mean(variances, weights)
    else:
        mean, variance = mixture_statistics(means, variances, weights)
    return {mean_key: mean, variance_key: variance}


def recalibrate(
    model: nn.Module,
    modelpool: BaseModelPool,
    fabric: Fabric,
    calibration: Calibration,
    *,
    names: Sequence[str] | None = None,
    norms: Collection[str] | None = None,
) -> nn.Module:
    """Recompute the statistics on the training images of some members, in place.

    Args:
        model: the network.
        modelpool: has the images.
        fabric: where to compute.
        calibration: the sample; equally many images of each member.
        names: of the members; all experts by default.
        norms: names of the norms that are recomputed; all by default.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.to(fabric.device)
    recalibrate_batch_norm(
        model,
        modelpool.images(names),
        images=calibration.images,
        batch_size=calibration.batch_size,
        seed=calibration.seed,
        device=fabric.device,
        norms=norms,
    )
    return model.to(home)


def recalibrate_tasks(
    network: MultiTaskNetwork,
    modelpool: BaseModelPool,
    fabric: Fabric,
    calibration: Calibration,
    norms: Collection[str],
) -> None:
    """Recompute statistics of each task's network on the images of its own experts, in place.

    Args:
        network: the network of all tasks of the pool.
        modelpool, fabric, calibration: see :func:`recalibrate`.
        norms: names of the norms that are recomputed, within a task's network.
    """
    for task, names in modelpool.tasks.items() if norms else ():
        recalibrate(
            network.for_task(task), modelpool, fabric, calibration, names=names, norms=norms
        )


def member_statistics(
    member: nn.Module, modelpool: BaseModelPool, fabric: Fabric, calibration: Calibration
) -> MemberStatistics:
    """Return the statistics of a member for `repair_mean`, which serve any number of means.

    Args:
        member: a network; it is not changed.
        modelpool: has the images.
        fabric: where to compute.
        calibration: the sample.
    """
    return channel_statistics(
        member,
        modelpool.images(),
        images=calibration.images,
        batch_size=calibration.batch_size,
        seed=calibration.seed,
        device=fabric.device,
    )


def repair_mean(
    model: nn.Module,
    members: Sequence[nn.Module | MemberStatistics],
    modelpool: BaseModelPool,
    fabric: Fabric,
    calibration: Calibration,
    *,
    weights: Sequence[float] | None = None,
) -> nn.Module:
    """Bring the channels of a mean network to the interpolation of its members', in place.

    Args:
        model: the mean of ``members``.
        members: the networks that it is the mean of, in one order of their units, or their
            `member_statistics` on the same sample.
        modelpool: has the images.
        fabric: where to compute.
        calibration: the sample.
        weights: of the members in the mean.
    """
    repair(
        model,
        members,
        modelpool.images(),
        weights=weights,
        images=calibration.images,
        batch_size=calibration.batch_size,
        seed=calibration.seed,
        device=fabric.device,
    )
    return model
