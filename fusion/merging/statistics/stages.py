"""Group layers into stages without dependencies within a stage."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx, nn

from fusion.models import Layer
from fusion.models.forward_pass import LAYER_FUNCTIONS, symbolic_graph
from fusion.models.layer import is_layer
from fusion.models.layers import without_values

log = logging.getLogger(__name__)


def stages(network: nn.Module, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers in the order of the forward pass, grouped into independent stages.

    A layer's stage is the largest number of layers on a path from the input to it: its inputs
    depend on earlier stages alone, and parallel branches share their stages. A layer that runs
    several times counts where it runs first. In a network that cannot be traced, every layer is a
    separate stage. Layers that do not run come last, each in a separate stage.

    Args:
        network: the network; it is not changed, and may live on the meta device.
        layers: layers of the network as :func:`fusion.models.find_layers` returns them.
    """
    reached = [layer for layer in layers if layer.reached]
    graph = symbolic_graph(without_values(network).eval())
    if isinstance(graph, str):
        log.info("%s: every layer is a separate stage, because %s", type(network).__name__, graph)
        depths = {layer.weight: number for number, layer in enumerate(reached)}
    else:
        depths = _depths(graph, network, layers)
    by_depth: dict[int, list[Layer]] = {}
    for layer in reached:
        if layer.weight in depths:
            by_depth.setdefault(depths[layer.weight], []).append(layer)
    rest = [[layer] for layer in layers if not layer.reached or layer.weight not in depths]
    return [by_depth[depth] for depth in sorted(by_depth)] + rest


def _depths(graph: fx.Graph, network: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Return for each layer that the graph runs the longest path to it, counted in layers."""
    owner = {key: layer.weight for layer in layers for key in layer.tensors}
    inside: dict[str, list[str]] = {}  # name of a module -> the layers within it, itself included
    for name, module in network.named_modules():
        keys = [f"{name}.{key}" if name else key for key in module.state_dict()]
        if is_layer(module):
            parts = name.split(".")
            weight = next((owner[key] for key in keys if key in owner), None)
            if weight is None:
                continue
            for depth in range(len(parts) + 1):
                inside.setdefault(".".join(parts[:depth]), []).append(weight)
    found: dict[str, int] = {}
    length: dict[fx.Node, int] = {}
    for node in graph.nodes:
        length[node] = max((length[parent] for parent in node.all_input_nodes), default=0)
        ran: list[str] = []
        if node.op == "call_module":
            ran = inside.get(str(node.target), [])
        elif node.op == "call_function" and node.target in LAYER_FUNCTIONS:
            ran = _weights_of(node, owner)
        for weight in ran:
            length[node] += 1
            found.setdefault(weight, length[node])
    return found


def _weights_of(node: fx.Node, owner: dict[str, str]) -> list[str]:
    """Return the layer of a functional call, whose weight is made of parameters alone."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    waiting = [weight] if isinstance(weight, fx.Node) else []
    while waiting:
        parent = waiting.pop()
        if parent.op == "get_attr" and parent.target in owner:
            return [owner[str(parent.target)]]
        waiting += parent.all_input_nodes
    return []
