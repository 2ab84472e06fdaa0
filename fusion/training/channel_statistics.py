"""Mean and variance of the channels of a network's pre-activations over a sample of images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.data import seed_from
from fusion.models import find_layers
from fusion.training.restoring import ready
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
def channel_statistics(
    model: nn.Module,
    data: Images,
    *,
    images: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, ChannelStatistics]:
    """Return the statistics of every pre-activation that `repair` adjusts, in one pass.

    These are the statistics of a member that `repair` needs. Measured once, they serve any number
    of repaired networks, as long as these are repaired with the same options.

    Args:
        model: the network; it runs in eval mode and is not changed.
        data: training images: a data set, or several by name, of which equally many are drawn.
        images: size of the sample, drawn at random; all images if there are fewer.
        batch_size: images per forward pass.
        seed: of the draw.
        device: where to compute; by default where the network is.

    Returns:
        Name of a module of `pre_activations` → mean and variance of its output's channels.

    Raises:
        UserError: a sample of less than two images.
    """
    sample = repair_sample(
        model, data, images=images, batch_size=batch_size, seed=seed, device=device
    )
    with ready(model, sample.device):
        names = pre_activations(model, next(sample())[:1])
        return measure_channels(model, dict.fromkeys(names), sample())


@dataclass(frozen=True)
class Sample:
    """The images that networks are measured on; every call yields the same batches.

    Attributes:
        data: where they are drawn from.
        images: how many, at most.
        batch_size: images per batch.
        seed: of the draw.
        device: device of the yielded images.
    """

    data: Images
    images: int
    batch_size: int
    seed: int
    device: torch.device

    def __call__(self) -> Iterator[Tensor]:
        """Yield the batches."""
        return sample_images(
            self.data,
            images=self.images,
            batch_size=self.batch_size,
            seed=seed_from(self.seed, "repair"),
            device=self.device,
        )


def repair_sample(
    model: nn.Module,
    data: Images,
    *,
    images: int,
    batch_size: int,
    seed: int,
    device: torch.device | str | None,
) -> Sample:
    """Return the sample on which members and the merged network are measured.

    Raises:
        UserError: a sample of less than two images.
    """
    check_sample_size(images, batch_size)
    check_enough_images(data, "repair")
    where = exact_device(device if device is not None else next(model.parameters()).device)
    return Sample(data, images, batch_size, seed, where)


def pre_activations(model: nn.Module, example_input: Tensor | None = None) -> list[str]:
    """Return the modules whose outputs are repaired: norms, and layers not followed by a norm.

    These are every batch norm with running statistics, and every convolution and linear layer that
    no such norm follows. The last layer, which computes the class scores, is excluded, and so are
    modules that do not run.

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
    model: nn.Module,
    calls: Mapping[str, int | None],
    sample: Iterator[Tensor],
    *,
    inputs: bool = False,
) -> dict[str, ChannelStatistics]:
    """Return the statistics of the outputs (or the inputs) of some modules, over all their calls.

    The model runs in the mode it is in.

    Args:
        model: the network.
        calls: name of a module → number of its runs in a pass. A pass stops after the last of these
            calls; where a number is None, passes run to their end.
        sample: batches of images.
        inputs: whether to measure the inputs of the modules instead of their outputs.
    """
    modules = {name: model.get_submodule(name) for name in calls}
    moments = {name: ChannelMoments(module) for name, module in modules.items()}
    until_end = None in calls.values()
    waiting: Counter[str] = Counter()

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            moments[name].add(args[0] if inputs else output)
            waiting[name] -= 1
            if not (until_end or any(waiting.values())):
                raise Enough

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        for pictures in sample:
            waiting.update({name: count or 0 for name, count in calls.items()})
            with suppress(Enough):
                look(model, pictures)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment.statistics() for name, moment in moments.items()}


def look(model: nn.Module, pictures: Tensor) -> None:
    """Run ``model`` on a batch for the sake of its hooks; the output is discarded."""
    model(pictures.to(image_dtype(model)))


class Enough(Exception):  # noqa: N818  # no error: the rest of the pass is not needed
    """All watched modules have run."""


class ChannelMoments:
    """Mean and sum of squared deviations, joined batch by batch (Chan et al., 1979).

    Args:
        module: whose inputs or outputs are added; its type determines the axis of the channels.
    """

    def __init__(self, module: nn.Module) -> None:
        self.axis = -1 if isinstance(module, nn.Linear) else 1
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Add a batch of activations."""
        wide = values.to(working_dtype([values])).movedim(self.axis, 0).flatten(1)
        n = wide.shape[1]
        # Sums are vectorised, `torch.var_mean` on a CPU is not: it takes ten times as long. The
        # rounding error of the first mean is the mean of the differences from it.
        centre = wide.mean(1, keepdim=True)
        wide = wide - centre
        rest = wide.mean(1).double()
        mean = centre[:, 0].double() + rest
        squares = wide.square_().sum(1).double() - n * rest.square()
        if self.count == 0:
            self.count, self.mean, self.squares = n, mean, squares
            return
        total = self.count + n
        step = mean - self.mean
        self.squares += squares + step.square() * (self.count * n / total)
        self.mean = self.mean + step * (n / total)
        self.count = total

    def statistics(self) -> ChannelStatistics:
        """Return mean and variance over everything that was added."""
        return ChannelStatistics(self.mean, self.squares.clamp(min=0) / max(self.count, 1))


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
