"""Give the channels of a merged network the statistics that its members' channels have (REPAIR)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusion.data import seed_from
from fusion.errors import UserError
from fusion.models import find_layers
from fusion.training.restoring import restored
from fusion.training.sampling import (
    Images,
    check_enough_images,
    check_sample_size,
    sample_images,
)
from fusion.weights import exact_device, image_dtype, working_dtype


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Mean and variance of every channel over a sample: images and pixels, (C,) in float64."""

    mean: Tensor
    variance: Tensor


@torch.no_grad()
def repair(
    model: nn.Module,
    members: Sequence[nn.Module],
    data: Images,
    *,
    weights: Sequence[float] | None = None,
    images: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> int:
    """Bring every channel's mean and deviation to the interpolation of the members'; in place.

    Averaging networks shrinks the variance of their activations, layer after layer. For each
    pre-activation, in the order of the forward pass, the merged network's mean and standard
    deviation are measured and brought to Σw·mean and Σw·deviation of the members', by a factor and
    a shift that are folded into the weights: where a batch norm follows, its running statistics
    become those of its input and its scale and shift the interpolated deviation and mean; else
    weight and bias of the convolution or linear layer are rescaled. Each layer is measured after
    all before it were repaired, on the same images, so the law holds exactly at every layer that
    runs once, for any batch size; the price is a pass per layer, up to that layer. A layer that
    runs several times in a pass is measured over all its calls and repaired once, which changes
    what its later calls are given. The last layer, whose outputs are the class scores, is left
    alone.

    Without a bias only the deviation can be repaired, and without scale and shift a batch norm is
    only recalibrated. A channel that does not vary in the merged network only gets the mean.

    Source: Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted
    Activations for Interpolation Repair" (arXiv 2211.08403).

    Args:
        model: the merged network; its weights, biases and batch norms are changed.
        members: the networks it was merged from, aligned; they are not changed.
        data: training images: a data set, or several by name, of which equally many are drawn.
        weights: of the members; only their ratios count. Equal ones by default.
        images: size of the sample, drawn at random; all images if there are fewer.
        batch_size: images per forward pass.
        seed: of the draw.
        device: where to compute; by default where the network is.

    Returns:
        The number of layers that were repaired.

    Raises:
        UserError: no member, weights that are no shares, or a sample of less than two images.
    """
    shares = _shares(weights, len(members))
    check_sample_size(images, batch_size)
    check_enough_images(data, "repair")
    where = exact_device(device if device is not None else next(model.parameters()).device)

    sample = partial(
        sample_images,
        data,
        images=images,
        batch_size=batch_size,
        seed=seed_from(seed, "repair"),
        device=where,
    )
    with _ready(model, where):
        sites = pre_activations(model, next(sample())[:1])
        goals = _goals(members, sites, shares, sample, where)
        for name, calls in _in_order(model, sites, sample).items():
            module = model.get_submodule(name)
            if isinstance(module, _BatchNorm):
                found = measure_channels(model, {name: calls}, sample(), inputs=True)
                _repair_norm(module, found[name], goals[name])
            else:
                found = measure_channels(model, {name: calls}, sample())
                _repair_layer(module, found[name], goals[name])
    return len(sites)


def pre_activations(model: nn.Module, example_input: Tensor | None = None) -> list[str]:
    """Return the modules whose outputs are repaired: norms, and layers that no norm follows.

    Every batch norm with running statistics, and every convolution and linear layer that none
    follows; never the last layer, which gives the class scores, nor one that does not run.

    Args:
        model: the network.
        example_input: only needed where it cannot be traced.
    """
    names = []
    for layer in [layer for layer in find_layers(model, example_input) if layer.reached][:-1]:
        norms = [name for name in layer.norms if _keeps_statistics(model.get_submodule(name))]
        # A weight that is no module's own (F.conv2d on a parameter) has no output to watch.
        is_module = layer.weight == f"{layer.name}.weight"
        names += norms or ([layer.name] if is_module else [])
    return names


def measure_channels(
    model: nn.Module, calls: Mapping[str, int], sample: Iterator[Tensor], *, inputs: bool = False
) -> dict[str, ChannelStatistics]:
    """Return the statistics of the outputs (or the inputs) of some modules, over all their calls.

    The model runs in the mode it is in; a pass ends with the last of the calls.

    Args:
        model: the network.
        calls: name of a module → how often it runs in a pass.
        sample: batches of images.
        inputs: whether to look at what comes in instead of what goes out.
    """
    moments = {name: _Moments() for name in calls}
    waiting: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            moments[name].add(args[0] if inputs else output, _channel_axis(module))
            waiting[name] -= 1
            if not any(waiting.values()):
                raise _Enough

        return hook

    modules = {name: model.get_submodule(name) for name in calls}
    handles = [
        module.register_forward_hook(watch(name, module)) for name, module in modules.items()
    ]
    try:
        for pictures in sample:
            waiting.update(calls)
            with suppress(_Enough):
                _look(model, pictures)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment.statistics() for name, moment in moments.items()}


def _look(model: nn.Module, pictures: Tensor) -> None:
    model(pictures.to(image_dtype(model)))


class _Enough(Exception):  # noqa: N818  # no error: the rest of the pass is not needed
    """All watched modules have run."""


class _Moments:
    """Mean and sum of squared deviations, joined batch by batch (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, values: Tensor, axis: int) -> None:
        wide = values.to(working_dtype([values])).movedim(axis, 0)
        wide = wide.flatten(1)
        variance, mean = torch.var_mean(wide, dim=1, correction=0)
        variance, mean, n = variance.double(), mean.double(), wide.shape[1]
        if self.count == 0:
            self.count, self.mean, self.squares = n, mean, variance * n
            return
        total = self.count + n
        step = mean - self.mean
        self.squares += variance * n + step.square() * (self.count * n / total)
        self.mean = self.mean + step * (n / total)
        self.count = total

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(self.mean, self.squares / max(self.count, 1))


@contextmanager
def _ready(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have ``model`` in eval mode on ``device``, and give it back as it came."""
    with restored(model):
        model.to(device)
        model.eval()
        yield


def _goals(
    members: Sequence[nn.Module],
    sites: Sequence[str],
    shares: Sequence[float],
    sample: Callable[[], Iterator[Tensor]],
    device: torch.device,
) -> dict[str, ChannelStatistics]:
    """Return the weighted means of the members' means and deviations."""
    found = []
    for member in members:
        with _ready(member, device):
            found.append(measure_channels(member, _in_order(member, sites, sample), sample()))
    goals = {}
    for name in sites:
        parts = [(share, statistics[name]) for share, statistics in zip(shares, found, strict=True)]
        mean = torch.stack([share * part.mean for share, part in parts]).sum(0)
        deviation = torch.stack([share * part.variance.sqrt() for share, part in parts]).sum(0)
        goals[name] = ChannelStatistics(mean, deviation.square())
    return goals


def _in_order(
    model: nn.Module, sites: Sequence[str], sample: Callable[[], Iterator[Tensor]]
) -> dict[str, int]:
    """Return ``sites`` in the order in which they run, and how often each does in a pass."""
    calls: Counter[str] = Counter()
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name in sites
    ]
    try:
        _look(model, next(sample()))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _repair_norm(norm: _BatchNorm, found: ChannelStatistics, goal: ChannelStatistics) -> None:
    """Normalise by what comes in; scale and shift to the goal.

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


def _channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _shares(weights: Sequence[float] | None, members: int) -> list[float]:
    if not members:
        raise UserError("members: none was given; REPAIR needs the networks that were merged")
    given = [1.0] * members if weights is None else list(weights)
    if len(given) != members or min(given) < 0 or not sum(given) > 0:
        raise UserError(
            f"weights: {given} for {members} members; give one number of 0 or more for each"
        )
    return [weight / sum(given) for weight in given]
