"""Recompute batch-norm statistics, which a network needs after its weights were merged."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fusion.data import seed_from
from fusion.training.restoring import ready
from fusion.training.sampling import (
    Images,
    check_enough_images,
    check_sample_size,
    sample_images,
)
from fusion.weights import image_dtype, working_dtype

_log = logging.getLogger(__name__)


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    data: Images,
    *,
    images: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    norms: Collection[str] | None = None,
) -> int:
    """Replace every running mean and variance by the average over a sample; in place.

    The sample is drawn at random because image folders are sorted by class, and the statistics of
    two classes ruin a network for the other eight. Each batch is normalised by its own statistics
    and counts by its number of images; a batch norm that runs several times in a pass counts every
    call. Where batches differ in the size of their images, which then come from different data
    sets, the variance between their means is added. All other modules are in evaluation mode (no
    dropout). Modes and momenta are restored.

    Source: the cumulative average is that of stochastic weight averaging (Izmailov et al., 2018),
    used on merged networks by REPAIR (Jordan et al., 2023).

    Args:
        model: the network; one without batch norm is not changed.
        data: training images: a data set, or several by name, of which equally many are drawn.
        images: size of the sample; all images if there are fewer.
        batch_size: larger batches give statistics nearer to those of the whole sample.
        seed: of the draw.
        device: where to compute; by default where the network is.
        norms: names of the batch norms that are recalibrated; all by default.

    Returns:
        The number of images used: a last batch of a single image, which has no variance, is
        dropped. 0 for a network without batch norm.

    Raises:
        UserError: ``images`` or ``batch_size`` is below 2, or the data set holds fewer than two.
    """
    check_sample_size(images, batch_size)
    chosen = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        and module.running_mean is not None
        and (norms is None or name in norms)
    ]
    if not chosen:
        _log.info("No batch norm with running statistics in %s", type(model).__name__)
        return 0
    check_enough_images(data, "recalibrate")
    device = device or next(t.device for t in (*model.parameters(), *model.buffers()))
    sample = sample_images(
        data,
        images=images,
        batch_size=batch_size,
        seed=seed_from(seed, "recalibration"),
        device=device,
    )
    used = 0
    sizes = set()
    with ready(model, device):
        several = isinstance(data, Mapping)
        with _averaging(chosen, note_means=several) as averages:
            for pictures in sample:
                if len(pictures) < 2:
                    continue
                used += len(pictures)
                sizes.add(pictures.shape[1:])
                model(pictures.to(image_dtype(model)))
            if len(sizes) > 1:
                for norm, average in averages.items():
                    average.add_spread(norm)
    return used


class _Average:
    """Record of one batch norm: the number of images over all its calls, and their means."""

    def __init__(self) -> None:
        self.images = 0
        self.means: list[tuple[int, Tensor]] = []

    def before(self, norm: _NormBase, arguments: tuple[Tensor, ...]) -> None:
        """Weigh the coming call by its share of all images so far."""
        self.images += len(arguments[0])
        norm.momentum = len(arguments[0]) / self.images

    def after(self, norm: _NormBase, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """Record the mean of the call's input, (C,)."""
        del norm, output
        values = arguments[0]
        mean = values.transpose(0, 1).flatten(1).to(working_dtype([values])).mean(1)
        self.means.append((len(values), mean.double()))

    def add_spread(self, norm: _NormBase) -> None:
        """Add the variance of the calls' means to the running variance."""
        assert norm.running_var is not None
        weights = [count / self.images for count, _ in self.means]
        means = torch.stack([mean for _, mean in self.means])
        share = means.new_tensor(weights)[:, None]
        centre = (share * means).sum(0)
        norm.running_var += (share * (means - centre).square()).sum(0).to(norm.running_var.dtype)


@contextmanager
def _averaging(
    norms: list[_NormBase], *, note_means: bool
) -> Iterator[Mapping[_NormBase, _Average]]:
    """Make batch norms average their statistics over all calls; momenta are restored."""
    momenta = [norm.momentum for norm in norms]
    averages = {norm: _Average() for norm in norms}
    handles = []
    try:
        for norm, average in averages.items():
            norm.train()
            norm.reset_running_stats()
            handles.append(norm.register_forward_pre_hook(average.before))
            if note_means:
                handles.append(norm.register_forward_hook(average.after))
        yield averages
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
