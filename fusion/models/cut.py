"""Networks cut in two: a trunk shared by tasks, and a tail that reads the trunk's features."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fusion.errors import UserError, suggestion
from fusion.models.forward_pass import LAYER_FUNCTIONS, symbolic_graph
from fusion.models.layer import is_layer

# Operations that leave every channel in place, so that output and input channels correspond.
_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_FUNCTIONS = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
    F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    torch.relu, torch.sigmoid, torch.tanh, torch.add, torch.mul,
    operator.add, operator.iadd, operator.mul, operator.imul,
}  # fmt: skip
_METHODS = {"relu", "relu_", "sigmoid", "tanh", "add", "add_", "mul", "mul_", "contiguous", "clone"}
_SOURCES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Crossing:
    """A value that the trunk computes and a tail reads.

    Attributes:
        node: its name in the network's graph.
        source: name of the norm or layer whose output channels it has; ``""`` for an input of the
            network, which needs no reading.
        channels: number of its channels.
        axis: the axis of the channels.
    """

    node: str
    source: str
    channels: int
    axis: int


@dataclass(frozen=True)
class Cut:
    """A place at which a network can be cut.

    Attributes:
        layer: name of the first layer of the tail.
        crossings: values that pass from the trunk to the tail.
        trunk: state-dict keys of the tensors in the trunk; all others are the tail's.
    """

    layer: str
    crossings: tuple[Crossing, ...]
    trunk: tuple[str, ...]


def find_cuts(model: nn.Module) -> tuple[Cut, ...]:
    """Return the places at which a network can be cut, in the order of its forward pass.

    That is before any convolution or linear layer, if every value that passes from one side to the
    other is an input or has the channels of one norm or layer (pooling, pointwise functions, sums
    and products leave channels as they are), and no module is on both sides.

    Args:
        model: a network that can be traced symbolically; its values do not matter.

    Raises:
        UserError: it cannot be traced.
    """
    nodes = list(graph_of(model).nodes)
    modules = dict(model.named_modules())
    place = {node: i for i, node in enumerate(nodes)}
    last_use = [max((place[user] for user in node.users), default=i) for node, i in place.items()]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for node, i in place.items():
        if node.op in ("call_module", "get_attr"):
            first.setdefault(str(node.target), i)
            last[str(node.target)] = i
    read_at = {key: _first_reader(key, first) for key in model.state_dict()}
    cuts = []
    open_values: list[fx.Node] = []  # made before, and read here or later
    for node, i in place.items():
        open_values = [value for value in open_values if last_use[place[value]] >= i]
        layer = node.op == "call_module" and is_layer(modules[str(node.target)])
        if layer and not any(first[name] < i <= last[name] for name in first):
            found = [_crossing(value, modules) for value in open_values]
            kept = tuple(one for one in found if one is not None)
            trunk = tuple(key for key, at in read_at.items() if at is not None and at < i)
            if len(kept) == len(found):
                cuts.append(Cut(str(node.target), kept, trunk))
        open_values.append(node)
    return tuple(cuts)


def graph_of(model: nn.Module) -> fx.Graph:
    """Return the graph of a network's forward pass, layers and norms kept whole.

    Raises:
        UserError: it cannot be traced.
    """
    graph = symbolic_graph(model)
    if not isinstance(graph, str):
        inputs = sum(node.op == "placeholder" for node in graph.nodes)
        graph = graph if inputs == 1 else f"its forward pass takes {inputs} inputs, not one"
    if isinstance(graph, str):
        raise UserError(
            f"{type(model).__name__} cannot be cut into trunk and tails ({graph}); merge it whole: "
            f"budget=null"
        )
    return graph


class CutNetwork(nn.Module):
    """A cut network that recovers its features from merged ones at the cut.

    It has the modules and tensors of the original network under their names, and for each value
    that crosses the cut an ``unmerge.<number>`` between trunk and tail. Networks of several tasks
    can have one trunk, whose features are computed once: :meth:`trunk`, then each :meth:`tail`.

    The graph is that of evaluation mode: functions with a ``training`` flag stay as they are there.

    Args:
        network: the original network, which is not changed; its modules are taken, not copied.
        layer: name of the first layer of the tail.
        dense: whether features are read out by a matrix over the channels, or each from one.

    Raises:
        UserError: the network cannot be cut there.

    Example::

        >>> import torch
        >>> from fusion.models import CifarResNet
        >>> network = CifarResNet(8).eval()
        >>> cut = CutNetwork(network, "layer3.0.conv1")
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.equal(cut.tail(cut.trunk(images)), network(images))
        True
    """

    def __init__(self, network: nn.Module, layer: str, *, dense: bool = False) -> None:
        super().__init__()
        # Traced in evaluation mode, which auxiliary heads and dropout ask for.
        bare = copy.copy(network).eval() if not network.training else _in_evaluation(network)
        cuts = {cut.layer: cut for cut in find_cuts(bare)}
        if layer not in cuts:
            raise UserError(
                f"{type(network).__name__} cannot be cut before '{layer}'"
                f"{suggestion(layer, cuts)} (it can before {', '.join(cuts) or 'no layer'})"
            )
        self.cut = cuts[layer]
        self.dense = dense
        self.original = type(network).__name__
        for name, child in network.named_children():
            self.add_module(name, child)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in network.named_buffers(recurse=False):
            persistent = name not in network._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        like = next(network.parameters(), torch.empty(0))
        self.unmerge = nn.ModuleList(
            Unmerge(one.channels, one.axis, dense=dense).to(like)
            for one in self.cut.crossings
            if one.source
        )
        self._trunk, self._tail = (
            # The generated function alone, which takes the module as its `self`.
            type(fx.GraphModule(network, half)).forward
            for half in _halves(graph_of(bare), self.cut)
        )
        self.train(network.training)

    def forward(self, images: Tensor) -> Any:
        """Return the output of the original network, whose tail reads merged features."""
        return self.tail(self.trunk(images))

    def trunk(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the values that cross the cut, as computed by the trunk."""
        return tuple(self._trunk(self, images))

    def tail(self, values: Sequence[Tensor]) -> Any:
        """Return the outputs for the trunk's values."""
        readers = iter(self.unmerge)
        read = [
            next(readers)(value) if one.source else value
            for one, value in zip(self.cut.crossings, values, strict=True)
        ]
        return self._tail(self, *read)


def reader_key(number: int, *, dense: bool) -> str:
    """Return the state-dict key of the readout of the ``number``-th value of a `CutNetwork`."""
    return f"unmerge.{number}.{'matrix' if dense else 'index'}"


class Unmerge(nn.Module):
    """Readout of a network's channels from merged ones; initially the identity.

    Args:
        channels: number of channels.
        axis: axis of the channels in the value.
        dense: by a matrix (each channel a combination of the merged ones) or by an index (each is
            one of them).
    """

    index: Tensor
    matrix: Tensor

    def __init__(self, channels: int, axis: int, *, dense: bool = False) -> None:
        super().__init__()
        self.axis = axis
        self.dense = dense
        if dense:
            self.register_buffer("matrix", torch.eye(channels))
        else:
            self.register_buffer("index", torch.arange(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Map merged features to features of the same shape."""
        if not self.dense:
            return features.index_select(self.axis, self.index)
        moved = features.movedim(self.axis, -1) @ self.matrix.T
        return moved.movedim(-1, self.axis)


def _in_evaluation(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval()


def _halves(graph: fx.Graph, cut: Cut) -> tuple[fx.Graph, fx.Graph]:
    """Return the graphs of trunk and tail."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    place = next(i for i, node in enumerate(nodes) if str(node.target) == cut.layer)
    by_name = {node.name: node for node in nodes}
    crossing = [by_name[one.node] for one in cut.crossings]
    trunk, tail = fx.Graph(), fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in nodes[:place]:
        known[node] = trunk.node_copy(node, known.__getitem__)
    trunk.output(tuple(known[node] for node in crossing))
    read = {node: tail.placeholder(node.name) for node in crossing}
    for node in nodes[place:]:
        read[node] = tail.node_copy(node, read.__getitem__)
    (output,) = (node for node in graph.nodes if node.op == "output")
    tail.output(fx.node.map_arg(output.args[0], read.__getitem__))
    return trunk, tail


def _first_reader(key: str, first: Mapping[str, int]) -> int | None:
    """Return the place of the first node that reads a tensor; ``None`` where none does."""
    parts = key.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return min((first[name] for name in names if name in first), default=None)


def _crossing(node: fx.Node, modules: Mapping[str, nn.Module]) -> Crossing | None:
    """Return the crossing of a value with the channels of a norm or layer, or of the input."""
    if node.op == "placeholder":
        return Crossing(node.name, "", 0, 1)
    found = _source(node, modules)
    if found is None:
        return None
    module = modules[found]
    if isinstance(module, _SOURCES):
        return Crossing(node.name, found, module.num_features, 1)
    if isinstance(module, nn.Linear):
        return Crossing(node.name, found, module.out_features, -1)
    return Crossing(node.name, found, int(module.out_channels), 1)  # type: ignore[arg-type]


def _source(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the norm or layer whose output channels a value has."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, _SOURCES) or is_layer(module):
            return str(node.target)
        passes = isinstance(module, _MODULES)
    elif node.op == "call_function":
        passes = node.target in _FUNCTIONS and node.target not in LAYER_FUNCTIONS
    else:
        passes = node.op == "call_method" and node.target in _METHODS
    if not passes:
        return None
    sources = [_source(parent, modules) for parent in node.all_input_nodes]
    # All terms of a sum have the same channels; a gate may have only one.
    sizes = {s: _channels(modules[s]) for s in sources if s is not None}
    return max(sizes, key=lambda s: sizes[s], default=None)


def _channels(module: nn.Module) -> int:
    for size in ("num_features", "out_channels", "out_features"):
        if hasattr(module, size):
            return int(getattr(module, size))
    return 0
