"""Batch-norm statistics computed anew: what a network needs after its weights were merged."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from fusion.data import seed_from
from fusion.training.restoring import restored
from fusion.training.sampling import check_enough_images, check_sample_size, sample_images
from fusion.weights import image_dtype

_log = logging.getLogger(__name__)


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    images: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> int:
    """Replace every running mean and variance by the average over a sample; in place.

    The sample is drawn at random, whatever the order of the data: folders come sorted by class,
    and the statistics of two classes ruin a network for the other eight. Each batch is
    normalised by its own statistics and counts by its number of images. Everything else is as
    in evaluation (no dropout), and modes and momenta are given back as they were.

    Source: the cumulative average is that of stochastic weight averaging (Izmailov et al., 2018),
    used on merged networks by REPAIR (Jordan et al., 2023).

    Args:
        model: the network; one without batch norm is left alone.
        dataset: training images.
        images: size of the sample; all images if there are fewer.
        batch_size: larger batches give statistics nearer to those of the whole sample.
        seed: of the draw.
        device: where to compute; by default where the network is.

    Returns:
        The number of images used: a last batch of a single image, which has no variance, is
        left out. 0 for a network without batch norm.

    Raises:
        UserError: ``images`` or ``batch_size`` is below 2, or the data set holds fewer than two.
    """
    check_sample_size(images, batch_size)
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        _log.info("No batch norm with running statistics in %s", type(model).__name__)
        return 0
    check_enough_images(dataset, "recalibrate")
    device = device or next(model.parameters()).device
    sample = sample_images(
        dataset,
        images=images,
        batch_size=batch_size,
        seed=seed_from(seed, "recalibration"),
        device=device,
    )
    momenta = [norm.momentum for norm in norms]
    used = 0
    try:
        with restored(model):
            model.to(device)
            model.eval()
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
            for pictures in sample:
                if len(pictures) < 2:
                    continue
                used += len(pictures)
                for norm in norms:
                    norm.momentum = len(pictures) / used
                model(pictures.to(image_dtype(model)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return used
