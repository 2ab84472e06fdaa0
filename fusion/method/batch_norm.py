"""What becomes of batch-norm statistics when networks are merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool
from fusion.training import recalibrate_batch_norm
from fusion.weights import weighted_mean, working_dtype

if TYPE_CHECKING:
    from lightning.fabric import Fabric

TREATMENTS = ("pretrained", "merge", "recalibrate", "auto")


def check_sample(calibration_images: int, batch_size: int) -> None:
    """Check that the images looked at can have a variance.

    Raises:
        UserError: an option is below 2.
    """
    for option, value in (("calibration_images", calibration_images), ("batch_size", batch_size)):
        if value < 2:
            raise UserError(f"{option} is {value}; a variance takes 2 images or more")


def chosen_treatment(treatment: str, modelpool: BaseModelPool, model: nn.Module) -> str:
    """Return what ``auto`` stands for here, and check that the choice is possible.

    ``auto`` recalibrates where the pool has training data, else merges; a network that keeps no
    running statistics has nothing to treat and is left as it is.

    Raises:
        UserError: recalibration was asked for and the pool has no training data.
    """
    if not statistics_keys(model):
        return "pretrained"
    if treatment == "auto":
        return "recalibrate" if modelpool.train_dataset_names else "merge"
    if treatment == "recalibrate" and not modelpool.train_dataset_names:
        raise UserError(
            "batch_norm=recalibrate needs images, and the pool has no train_datasets; add them, "
            "or choose batch_norm=merge or pretrained"
        )
    return treatment


def statistics_keys(
    model: nn.Module, norms: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Return the keys (running mean, running variance) of every batch norm that keeps them.

    Args:
        model: the network.
        norms: names of norm modules to look at; all by default.
    """
    return [
        (f"{name}.running_mean", f"{name}.running_var")
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (norms is None or name in norms)
    ]


def working(tensor: Tensor) -> Tensor:
    """Return a member's tensor on the CPU in float32 or better, where merging happens."""
    return tensor.to("cpu", working_dtype([tensor]))


def mixture_statistics(
    means: Sequence[Tensor], variances: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a mixture: Σwμ, and Σw(σ² + μ²) − (Σwμ)².

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
    base: Mapping[str, Tensor],
    keys: tuple[str, str],
    experts: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
) -> dict[str, Tensor]:
    """Return the mixture's statistics of one batch norm, in the base's dtype."""
    mean_key, variance_key = keys
    mean, variance = mixture_statistics(
        [working(expert[mean_key]) for expert in experts],
        [working(expert[variance_key]) for expert in experts],
        weights,
    )
    return {
        mean_key: mean.to(base[mean_key].dtype),
        variance_key: variance.to(base[variance_key].dtype),
    }


def recalibrate(
    model: nn.Module,
    modelpool: BaseModelPool,
    fabric: Fabric,
    *,
    images: int,
    batch_size: int,
    seed: int,
) -> nn.Module:
    """Recompute the statistics over a shuffled sample of the pool's training data, in place."""
    dataset: Any = modelpool.calibration_dataset()
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.to(fabric.device)
    recalibrate_batch_norm(
        model, dataset, images=images, batch_size=batch_size, seed=seed, device=fabric.device
    )
    return model.to(home)
