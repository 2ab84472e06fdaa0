"""Moments of a layer behind a merged prefix, for merging layer after layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusion.errors import UserError
from fusion.merging.statistics.grams import GramMatrix, modules_of
from fusion.merging.statistics.measuring import laid_out, measured
from fusion.merging.statistics.reading import reads_as_torch_does
from fusion.models import Layer
from fusion.weights import exact_device, image_dtype, working_dtype


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a layer's inputs in one network and outputs in another, on the same images.

    x̃ is the layer's input patch behind the merged prefix, and a 1; y is the output of the expert's
    layer in the expert, bias included. All are means over images and output positions, float64 on
    the CPU; columns have the order of :meth:`Piece.matrices <fusion.merging.Piece.matrices>`. The
    least-squares weight and bias W̃ from x̃ to y solve W̃ · xx = yx.

    Attributes:
        xx: of x̃ x̃ᵀ, (g, d + 1, d + 1).
        yx: of y x̃ᵀ, (g, out/g, d + 1).
        yy: of y², (g, out/g).
        positions: number of output positions over all images and calls.
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    positions: int


def prefix_moments(
    merged: nn.Module,
    expert: nn.Module,
    stage: Sequence[Layer],
    images: Iterable[Tensor],
    *,
    device: torch.device | str | None = None,
) -> dict[str, Moments]:
    """Return the moments of the layers of one stage; see :func:`stages`.

    For each batch the expert runs up to the last layer of the stage, and then the merged network;
    nothing is kept after its batch. A layer that runs several times counts all its calls, the i-th
    of one network paired with the i-th of the other.

    Merging layer after layer with fixed memory takes one pass per stage, which stops behind that
    stage.

    Args:
        merged: the network whose layers before the stage are merged already; its tensors of the
            stage itself do not matter, unless a layer runs several times.
        expert: a network of the same architecture; heads may differ in size.
        stage: layers that do not depend on each other.
        images: batches of the expert's images.
        device: where to compute; by default where the merged network is.

    Returns:
        State-dict key of the weight → moments, for the layers that run as separate modules.

    Raises:
        UserError: no image.
    """
    home = next((p.device for p in merged.parameters()), torch.device("cpu"))
    where = exact_device(home if device is None else device)
    theirs, ours = modules_of(expert, stage), modules_of(merged, stage)
    sums = {layer.weight: _Sums() for layer in stage}
    answers: dict[str, list[tuple[nn.Module, Tensor]]] = {key: [] for key in sums}
    checked: dict[nn.Module, bool] = {}

    def keep(layer: Layer, module: nn.Module, call: _Call) -> None:
        if module not in checked:
            checked[module] = reads_as_torch_does(module, call.values, call.output)
        # A copy: an activation function may work in place.
        answers[layer.weight].append((module, call.output.clone()))

    def add(layer: Layer, _: nn.Module, call: _Call) -> None:
        module, answer = answers[layer.weight].pop(0)
        if checked[module]:
            sums[layer.weight].add(module, call, answer)

    seen = 0
    with measured(merged, where), measured(expert, where), torch.no_grad():
        calls: Counter[nn.Module] | None = None
        for batch in images:
            seen += len(batch)
            pictures = laid_out(batch, where, image_dtype(merged))
            if calls is None:
                calls = _calls(merged, ours, pictures[:1])
                expected = _calls(expert, theirs, pictures[:1])
            _run(expert, theirs, expected, pictures, keep)
            _run(merged, ours, calls, pictures, add)
    if not seen:
        raise UserError("images: moments take at least one image")
    return {key: moments.mean() for key, moments in sums.items() if moments.positions}


class _Enough(Exception):  # noqa: N818  # no error: the rest of the pass is not needed
    """All watched modules have run."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer's module."""

    values: Tensor
    more: tuple[Any, ...]  # further arguments, such as the size of a transposed output
    options: Mapping[str, Any]
    output: Tensor


Watcher = Callable[[Layer, nn.Module, _Call], None]


def _run(
    network: nn.Module,
    modules: Mapping[nn.Module, Layer],
    calls: Mapping[nn.Module, int],
    images: Tensor,
    watcher: Watcher,
) -> None:
    """Run a network until all calls of some modules are over; ``watcher`` sees each of them."""
    waiting = Counter(calls)

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            options = {key: value for key, value in kwargs.items() if key != "input"}
            values = args[0] if args else kwargs["input"]
            watcher(layer, module, _Call(values, args[1:], options, output))
            waiting[module] -= 1
            if not any(waiting.values()):
                raise _Enough

        return hook

    with ExitStack() as stack:
        for module, layer in modules.items():
            handle = module.register_forward_hook(watch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        if any(waiting.values()):
            with suppress(_Enough):
                network(images)


def _calls(
    network: nn.Module, modules: Mapping[nn.Module, Layer], images: Tensor
) -> Counter[nn.Module]:
    """Return the number of runs of each module in a pass."""
    calls: Counter[nn.Module] = Counter()
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda m, *_: calls.update([m]))
            stack.callback(handle.remove)
        network(images)
    return calls


class _Sums:
    """The moments of one layer, added up batch by batch."""

    def __init__(self) -> None:
        self.positions = 0
        self._gram = GramMatrix()
        self._yx: Tensor | None = None
        self._yy: Tensor | None = None

    def add(self, module: nn.Module, call: _Call, output: Tensor) -> None:
        """Add one call behind the prefix, and the output of the expert's ``module``."""
        self._gram.add(module, call.values, output)
        self.positions = self._gram.positions
        groups = module.groups if isinstance(module, _ConvNd) else 1
        axis = -len(module.kernel_size) - 1 if isinstance(module, _ConvNd) else -1
        units = output.movedim(axis, 0).flatten(1)
        units = units.view(groups, -1, units.shape[1])
        sums = units.sum(-1, dtype=torch.float64)
        yy = units.square().sum(-1, dtype=torch.float64)
        products = _as_matrices(_products(module, call, output).double(), module)
        yx = torch.cat([products, sums[..., None]], dim=-1)
        self._yx = yx if self._yx is None else self._yx + yx
        self._yy = yy if self._yy is None else self._yy + yy

    def mean(self) -> Moments:
        assert self._yx is not None
        assert self._yy is not None
        return Moments(
            xx=self._gram.mean().cpu(),
            yx=(self._yx / self.positions).cpu(),
            yy=(self._yy / self.positions).cpu(),
            positions=self.positions,
        )


def _products(module: nn.Module, call: _Call, output: Tensor) -> Tensor:
    """Return the sums of output times input for each entry of the weight, in its shape.

    They are the gradient of Σ output · module(input) with respect to the weight.
    """
    dtype = working_dtype([call.values, output])
    own = {key: tensor.detach().to(dtype) for key, tensor in module.named_parameters()}
    own["weight"].requires_grad_()
    with torch.enable_grad():
        arguments = (call.values.to(dtype), *call.more)
        answer = functional_call(module, own, arguments, dict(call.options))
        (gradient,) = torch.autograd.grad(answer, own["weight"], output.to(dtype))
    return gradient


def _as_matrices(weight: Tensor, module: nn.Module) -> Tensor:
    """Return a tensor of the weight's shape as :meth:`Piece.matrices` does."""
    groups = module.groups if isinstance(module, _ConvNd) else 1
    if not isinstance(module, _ConvTransposeNd):
        return weight.reshape(groups, len(weight) // groups, -1)
    split = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return split.transpose(1, 2).reshape(groups, weight.shape[1], -1)
