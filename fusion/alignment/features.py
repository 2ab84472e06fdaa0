"""Correlations of the units of several networks on the same images, within and between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusion.alignment.recording import AT_ONCE, Recorder, run_on, watch
from fusion.alignment.spec import Entry, PermutationSpec
from fusion.errors import UserError

# Deviations below this share of a layer's largest are rounding: the unit does not vary.
CONSTANT = 1e-6


def feature_correlations(
    spec: PermutationSpec,
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Return for each group of units the correlation of all units of all networks.

    The features are the outputs of the convolutions and linear layers that make the units of a
    group, over all images and pixels; the correlations of several such layers (a residual stream)
    are averaged. The images are read once, and activations are kept for one batch only. Two
    units that do not vary count as equal: their correlation is 1, and 0 with all others.

    Args:
        spec: The symmetries that the networks have in common.
        models: Private copies in eval mode, which are moved to ``device``.
        data: Batches of images, or of tuples whose first part is one.
        device: Where to compute.

    Returns:
        Name of a group → (n·size, n·size) float64 on the CPU for n networks: the units of the
        first network, then those of the second, and so on. Groups whose units no watched module
        makes, and groups of blocks, are missing.

    Raises:
        UserError: ``data`` is empty or does not fit the networks.
    """
    networks = [model.to(device) for model in models]
    visible, watched = watch(spec, networks[0])
    moments = {key: _Moments() for key in watched}
    images = 0
    with ExitStack() as stack:
        recorders = [stack.enter_context(Recorder(model, watched)) for model in networks]
        for batch in tqdm(data, desc="features", leave=False, disable=None):
            pictures = batch[0] if isinstance(batch, tuple | list) else batch
            for x in pictures.split(AT_ONCE):
                images += len(x)
                for model in networks:
                    run_on(model, x.to(device))
                for key, moment in moments.items():
                    outputs = [recorder.take(key) for recorder in recorders]
                    found = [output for output in outputs if output is not None]
                    if len(found) == len(networks):
                        moment.add(torch.cat(found))
    if images == 0:
        raise UserError("data: no images came; activations need at least one batch")
    tables = {key: moment.correlation() for key, moment in moments.items() if moment.count}
    found_groups = {}
    for group in visible.groups:
        entries = [entry for entry in group.entries if entry.tensor in tables]
        if entries and not group.members:
            each = [_of_units(tables[e.tensor], e, len(networks)) for e in entries]
            found_groups[group.name] = torch.stack(each).mean(0)
    return found_groups


def _of_units(table: Tensor, entry: Entry, networks: int) -> Tensor:
    """Return the correlation of the units, mean over the channels that each of them has."""
    starts = torch.arange(networks).view(-1, 1) * (len(table) // networks)
    rows = [(starts + places).flatten() for places in entry.positions.unbind(1)]
    return torch.stack([table[row][:, row] for row in rows]).mean(0)


class _Moments:
    """Means and covariance of the channels of all networks, batch by batch, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.shift: Tensor
        self.total: Tensor
        self.product: Tensor

    def add(self, channels: Tensor) -> None:
        """Add samples, (channels, samples)."""
        channels = channels.double()
        if self.count == 0:
            # Differences from the first batch's means: small numbers, so their squares keep digits.
            self.shift = channels.mean(1, keepdim=True)
            self.total = channels.new_zeros(len(channels))
            self.product = channels.new_zeros(len(channels), len(channels))
        centred = channels - self.shift
        self.count += centred.shape[1]
        self.total += centred.sum(1)
        self.product += centred @ centred.T

    def correlation(self) -> Tensor:
        """Return the correlation, (channels, channels) on the CPU."""
        mean = self.total / self.count
        covariance = self.product / self.count - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        constant = deviation <= CONSTANT * deviation.max()
        scale = torch.where(constant, torch.inf, deviation)
        correlation = (covariance / torch.outer(scale, scale)).clamp(-1, 1)
        correlation += torch.outer(constant, constant).to(correlation)
        correlation.fill_diagonal_(1.0)
        return correlation.cpu()
