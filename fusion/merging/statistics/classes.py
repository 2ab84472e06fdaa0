"""Class statistics of the head's inputs: means of features and shares of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.models import Layer


class ClassMoments:
    r"""The mean of :math:`e_y \tilde x^T`, x̃ the features of an image and a 1, y its label.

    Row c is the share of class c times the mean of its features, followed by that share. With the
    Gram matrix of the same layer, this suffices for a linear least-squares or a linear discriminant
    classifier.

    The last of the layers that runs is measured. If it is not an ``nn.Linear`` that receives one
    row per image, there are no statistics.

    Args:
        network: the network, in evaluation mode.
        layers: the layers, in the order of the forward pass.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer]) -> None:
        self._network = network
        last = [layer for layer in layers if layer.reached][-1:]
        self._layer = next(
            (
                layer
                for layer in last
                if layer.weight == f"{layer.name}.weight"
                and isinstance(network.get_submodule(layer.name), nn.Linear)
            ),
            None,
        )
        self._images = 0
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Run the network on a batch and add the features of each class.

        Raises:
            UserError: an image has no label, or one without an output.
        """
        if self._layer is None:
            return
        head = self._network.get_submodule(self._layer.name)
        handle = head.register_forward_pre_hook(self._watch(images, labels))
        try:
            self._network(images)
        finally:
            handle.remove()

    def finished(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (state-dict key of the weight, (classes, d + 1) in float64)."""
        if self._layer is not None and self._sums is not None:
            yield self._layer.weight, self._sums / self._images

    def _watch(self, images: Tensor, labels: Tensor | None) -> Any:
        def hook(head: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
            features = arguments[0]
            if features.ndim != 2 or len(features) != len(images):
                return
            outputs = head.out_features
            if labels is None or int(labels.min()) < 0 or int(labels.max()) >= outputs:
                raise UserError(
                    f"labels: the network has {outputs} outputs, and the images have "
                    f"{'no labels' if labels is None else f'labels up to {int(labels.max())}'}; "
                    f"give the images the classes of the outputs"
                )
            rows = torch.nn.functional.one_hot(labels.to(features.device).long(), outputs)
            ones = features.new_ones(len(features), 1)
            inputs = torch.cat([features, ones], 1).double()
            total = rows.double().mT @ inputs
            self._sums = total if self._sums is None else self._sums + total
            self._images += len(images)

        return hook
