"""Gram matrices of the inputs of a network's layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusion.merging.statistics.patches import PatchProducts
from fusion.merging.statistics.products import BYTES
from fusion.merging.statistics.reading import Axis, read_input, reads_as_torch_does
from fusion.merging.statistics.shifts import ShiftedProducts
from fusion.models import Layer
from fusion.models.layer import is_layer
from fusion.weights import working_dtype

log = logging.getLogger(__name__)

# With fewer channels in a group, products of c × c entries are too small to be efficient.
_FEW_CHANNELS = 16


class GramMatrix:
    """The mean of x̃ᵀx̃ over all images and output positions, x̃ the input patch and a 1.

    Products are formed in float32 (float64 of float64 inputs) over some thousand positions, and
    added up in float64.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._sums: dict[tuple[Axis, ...], ShiftedProducts | PatchProducts] = {}

    @torch.no_grad()
    def add(self, module: nn.Module, values: Tensor, output: Tensor) -> None:
        """Add one call of a layer.

        Args:
            module: a linear layer or a convolution, transposed or not.
            values: its input.
            output: its output, of which only the shape matters.
        """
        if not values.numel():
            return
        for some, made in _some_images(module, values, output):
            reading = read_input(module, some.detach().to(working_dtype([some])), made)
            self.positions += reading.positions
            if reading.axes not in self._sums:
                _, groups, channels = reading.values.shape[:3]
                few = bool(reading.axes) and channels < _FEW_CHANNELS
                kind = PatchProducts if few else ShiftedProducts
                self._sums[reading.axes] = kind(
                    reading.axes, groups, channels, device=reading.values.device
                )
            self._sums[reading.axes].add(reading.values)

    def mean(self) -> Tensor:
        """Return the matrix, (g, d + 1, d + 1) in float64: symmetric, its last entry is 1."""
        totals = iter(self._sums.values())
        mean = next(totals).total()
        for products in totals:
            mean += products.total()
        mean /= self.positions
        mean[:, -1, -1] = 1
        return mean


class Grams:
    """The Gram matrices of some layers of one network.

    A layer whose weight several modules share, or whose module runs several times in a pass, counts
    all its calls. There is no matrix for layers that do not run, for weights that no module holds
    (a parameter used in ``F.conv2d``, a parametrized weight), and for modules of a subclass that
    differ from torch's (pad their input, change their weight).

    Args:
        network: the network, in evaluation mode.
        layers: the layers.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer]) -> None:
        self._network = network
        self._layers = layers
        self._modules = modules_of(network, layers)
        self._grams: dict[str, GramMatrix] = {}
        self._checked: dict[nn.Module, bool] = {}

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Run the network on a batch of images and add the inputs of its layers."""
        del labels
        with ExitStack() as stack:
            for module, layer in self._modules.items():
                stack.callback(self._watch(module, layer).remove)
            self._network(images)

    def finished(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (state-dict key of the weight, Gram matrix), in the order of the layers.

        Sums are freed one by one: nothing can be added afterwards.
        """
        for layer in self._layers:
            gram = self._grams.pop(layer.weight, None)
            if gram is None:
                log.debug("No Gram matrix of '%s': it did not run as a module", layer.name)
            else:
                yield layer.weight, gram.mean()

    def _watch(self, module: nn.Module, layer: Layer) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
            values = args[0] if args else kwargs["input"]
            if module not in self._checked:
                self._checked[module] = reads_as_torch_does(module, values, output)
                if not self._checked[module]:
                    log.info(
                        "No Gram matrix of '%s': %s does not read its input as torch's layers do",
                        layer.name,
                        type(module).__name__,
                    )
            if self._checked[module]:
                self._grams.setdefault(layer.weight, GramMatrix()).add(module, values, output)

        return module.register_forward_hook(hook, with_kwargs=True)


def modules_of(network: nn.Module, layers: Sequence[Layer]) -> dict[nn.Module, Layer]:
    """Return the modules that use the layers' weights as they are, tied ones included."""
    modules = {name: module for name, module in network.named_modules() if is_layer(module)}
    found: dict[nn.Module, Layer] = {}
    for layer in layers:
        own = modules.get(layer.name)
        key = f"{layer.name}.weight" if layer.name else "weight"
        if own is None or layer.weight != key:
            log.debug("'%s' is used by a function, not by a module of its own", layer.weight)
            continue
        sharing = [module for module in modules.values() if module.weight is own.weight]
        found.update(dict.fromkeys(sharing, layer))
    return found


def _some_images(
    module: nn.Module, values: Tensor, output: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of a convolution's batch, because padding and inserted zeros take memory."""
    if not isinstance(module, _ConvNd) or values.ndim == len(module.kernel_size) + 1:
        yield values, output
        return
    per_image = max(1, 4 * values[0].numel())
    if isinstance(module, _ConvTransposeNd):
        per_image *= torch.Size(module.stride).numel()
    images = max(1, BYTES // per_image)
    yield from zip(torch.split(values, images), torch.split(output, images), strict=True)
