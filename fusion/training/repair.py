"""REPAIR: restore the channel statistics of a merged network from those of its members."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusion.errors import UserError
from fusion.training.channel_statistics import (
    ChannelMoments,
    ChannelStatistics,
    Sample,
    channel_statistics,
    look,
    measure_channels,
    pre_activations,
    repair_sample,
)
from fusion.training.lockstep import HeldBytes, Lockstep
from fusion.training.restoring import ready
from fusion.training.sampling import Images
from fusion.weights import image_dtype

MemberStatistics = Mapping[str, ChannelStatistics]
HELD_BYTES = 2 << 30  # 2,000 images of CIFAR-10 in a ResNet-20 take a third of it


@torch.no_grad()
def repair(
    model: nn.Module,
    members: Sequence[nn.Module | MemberStatistics],
    data: Images,
    *,
    weights: Sequence[float] | None = None,
    images: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    held_bytes: int = HELD_BYTES,
) -> int:
    """Bring every channel's mean and deviation to the interpolation of the members'; in place.

    Averaging networks shrinks the variance of their activations, layer after layer. For each
    pre-activation, in the order of the forward pass, the merged network's mean and standard
    deviation are measured and brought to Σw·mean and Σw·deviation of the members', by a factor and
    a shift that are folded into the weights. Where a batch norm follows, its running statistics
    become those of its input, and its scale and shift become the interpolated deviation and mean.
    Otherwise the weight and bias of the convolution or linear layer are rescaled. Each layer is
    measured on the same images after all preceding layers were repaired, so the law holds exactly
    at every layer that runs once, for any batch size. A layer that runs several times in a pass is
    measured over all its calls and repaired once, which changes the inputs of its later calls. The
    last layer, whose outputs are the class scores, is not repaired.

    It takes one pass of each member, and one of the merged network, in which all batches wait at
    each layer until it is repaired. Where the activations held meanwhile would exceed
    ``held_bytes`` (the first layers, for photographs), a layer takes a separate pass up to that
    layer. The same applies to a layer that runs several times.

    Without a bias only the deviation can be repaired, and without scale and shift a batch norm is
    only recalibrated. A channel that does not vary in the merged network only gets the mean.

    Source: Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted
    Activations for Interpolation Repair" (arXiv 2211.08403).

    Args:
        model: the merged network; its weights, biases and batch norms are changed.
        members: the networks it was merged from, aligned, which are not changed; or their results
            of `channel_statistics` with the same data, images, batch size and seed.
        data: training images: a data set, or several by name, of which equally many are drawn.
        weights: of the members; only their ratios count. Equal ones by default.
        images: size of the sample, drawn at random; all images if there are fewer.
        batch_size: images per forward pass.
        seed: of the draw.
        device: where to compute; by default where the network is.
        held_bytes: memory limit for the activations of waiting batches. It does not affect the
            result.

    Returns:
        The number of layers that were repaired.

    Raises:
        UserError: no member, a member of another architecture, invalid weights, or a sample of
            fewer than two images.
    """
    shares = _shares(weights, len(members))
    options: dict[str, Any] = {"images": images, "batch_size": batch_size, "seed": seed}
    sample = repair_sample(model, data, **options, device=device)
    found = [
        channel_statistics(member, data, **options, device=sample.device)
        if isinstance(member, nn.Module)
        else member
        for member in members
    ]
    with ready(model, sample.device):
        sites = _sites(model, sample)
        goals = _goals(found, sites, shares)
        limit = held_bytes / _size(sample)
        for once, part in itertools.groupby(
            sites.items(), lambda item: item[1].calls == 1 and item[1].held <= limit
        ):
            together = dict(part)
            if once and len(together) > 1:
                _repair_together(model, list(together), goals, sample)
                continue
            for name, site in together.items():
                module = model.get_submodule(name)
                inputs = isinstance(module, _BatchNorm)
                measured = measure_channels(model, {name: site.calls}, sample(), inputs=inputs)
                _repair_module(module, measured[name], goals[name])
    return len(sites)


@dataclass
class _Site:
    """A module whose output is repaired.

    Attributes:
        calls: how often it runs in a pass.
        held: bytes per image that a pass stopped there keeps in memory.
    """

    calls: int = 0
    held: int = 0


def _sites(model: nn.Module, sample: Sample) -> dict[str, _Site]:
    """Return the modules to repair in the order in which they run, seen on one image."""
    picture = next(sample())[:1].clone().to(image_dtype(model))
    names = pre_activations(model, picture)
    sites: dict[str, _Site] = {}
    held = HeldBytes(picture)

    def note(name: str, *_: object) -> None:
        site = sites.setdefault(name, _Site())
        site.calls += 1
        site.held = max(site.held, held.now())

    handles = [
        model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names
    ]
    try:
        with held:
            look(model, picture)
    finally:
        for handle in handles:
            handle.remove()
    return sites


def _repair_together(
    model: nn.Module, names: Sequence[str], goals: MemberStatistics, sample: Sample
) -> None:
    """Repair modules that run once each, one after another, in a single pass."""
    with Lockstep(model, sample()) as passes:
        for name in names:
            module = model.get_submodule(name)
            moments = ChannelMoments(module)

            def before(_: nn.Module, args: Any, moments: ChannelMoments = moments) -> None:
                moments.add(args[0])
                passes.stop()

            def after(
                layer: nn.Module, args: Any, output: Tensor, moments: ChannelMoments = moments
            ) -> Any:  # whatever a layer returns
                moments.add(output)
                passes.stop()
                return layer.forward(*args)  # with the weights as they are now

            if isinstance(module, _BatchNorm):
                handle = module.register_forward_pre_hook(before)
            else:
                handle = module.register_forward_hook(after)
            try:
                passes.advance()
            finally:
                handle.remove()
            _repair_module(module, moments.statistics(), goals[name])


def _goals(
    members: Sequence[MemberStatistics], sites: Mapping[str, object], shares: Sequence[float]
) -> dict[str, ChannelStatistics]:
    """Return the weighted means of the members' means and deviations."""
    goals = {}
    for name in sites:
        for number, member in enumerate(members):
            if name not in member:
                raise UserError(
                    f"members: number {number} has no '{name}', which the merged network has; "
                    f"REPAIR takes members of one architecture"
                )
        parts = [(share, member[name]) for share, member in zip(shares, members, strict=True)]
        mean = torch.stack([share * part.mean for share, part in parts]).sum(0)
        deviation = torch.stack([share * part.variance.sqrt() for share, part in parts]).sum(0)
        goals[name] = ChannelStatistics(mean, deviation.square())
    return goals


def _size(sample: Sample) -> int:
    """Return the maximum number of images in the sample."""
    data = sample.data
    parts = list(data.values()) if isinstance(data, Mapping) else [data]
    lengths = [len(part) for part in parts if isinstance(part, Sized)]
    return min(sample.images, sum(lengths)) if len(lengths) == len(parts) else sample.images


def _repair_module(module: nn.Module, found: ChannelStatistics, goal: ChannelStatistics) -> None:
    """Repair a batch norm by the statistics of its input, a layer by those of its output."""
    if isinstance(module, _BatchNorm):
        _repair_norm(module, found, goal)
    else:
        _repair_layer(module, found, goal)


def _repair_norm(norm: _BatchNorm, found: ChannelStatistics, goal: ChannelStatistics) -> None:
    """Normalise by the statistics of the input; scale and shift to the goal.

    Args:
        norm: the batch norm.
        found: of its input.
        goal: for its output.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(found.mean)
    norm.running_var.copy_(found.variance)
    if norm.affine:
        # By the variance as it was stored, in the norm's own precision.
        stored = norm.running_var.double() + norm.eps
        factor = (goal.variance * stored / found.variance).sqrt()
        signed = torch.where(norm.weight < 0, -factor, factor)
        norm.weight.copy_(torch.where(found.variance > 0, signed, norm.weight.double()))
        norm.bias.copy_(goal.mean)


def _repair_layer(layer: nn.Module, found: ChannelStatistics, goal: ChannelStatistics) -> None:
    """Fold factor and shift from the statistics found to the goal into weight and bias."""
    assert isinstance(layer, _ConvNd | nn.Linear)
    varies = found.variance > 0
    factor = torch.where(varies, (goal.variance / found.variance).sqrt(), 1.0)
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, …): rows of a group share factors
        split = weight.double().view(layer.groups, -1, *weight.shape[1:])
        column = factor.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight.copy_((split * column).view_as(weight))
    else:
        weight.copy_(weight.double() * factor.view(-1, *[1] * (weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.copy_(factor * (layer.bias.double() - found.mean) + goal.mean)


def _shares(weights: Sequence[float] | None, members: int) -> list[float]:
    if not members:
        raise UserError("members: none was given; REPAIR needs the networks that were merged")
    given = [1.0] * members if weights is None else list(weights)
    if len(given) != members or min(given) < 0 or not sum(given) > 0:
        raise UserError(
            f"weights: {given} for {members} members; give one number of 0 or more for each"
        )
    return [weight / sum(given) for weight in given]
