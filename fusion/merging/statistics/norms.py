"""Mean and variance of the inputs of a network's batch norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fusion.models import Layer
from fusion.training.channel_statistics import ChannelMoments


class NormMoments:
    """Mean and variance of the inputs of some norms of one network, over images and positions.

    The norms with running statistics that belong to the layers are measured; one that runs several
    times in a pass counts every call.

    Args:
        network: the network, in evaluation mode.
        layers: the layers whose norms are measured.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer]) -> None:
        self._network = network
        wanted = {norm for layer in layers for norm in layer.norms}
        self._modules = {
            name: module
            for name, module in network.named_modules()
            if name in wanted and isinstance(module, _NormBase) and module.running_mean is not None
        }
        self._moments = {name: ChannelMoments(module) for name, module in self._modules.items()}

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Run the network on a batch of images and add the inputs of its norms."""
        del labels
        with ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_pre_hook(self._watch(name)).remove)
            self._network(images)

    def finished(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (state-dict key of the running mean, mean and variance (2, C) in float64)."""
        for name, moments in self._moments.items():
            if moments.count:
                found = moments.statistics()
                yield f"{name}.running_mean", torch.stack([found.mean, found.variance])

    def _watch(self, name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._moments[name].add(arguments[0])

        return hook
