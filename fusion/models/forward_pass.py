"""Record a forward pass in a ledger, either by symbolic tracing or by running it."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fusion.models.layer import Belongings, Kind, Ledger, is_layer, is_leaf, is_norm

LAYER_FUNCTIONS: dict[Callable[..., Any], Kind] = {
    F.conv1d: "conv",
    F.conv2d: "conv",
    F.conv3d: "conv",
    F.conv_transpose1d: "conv_transpose",
    F.conv_transpose2d: "conv_transpose",
    F.conv_transpose3d: "conv_transpose",
    F.linear: "linear",
}
_GROUPS_POSITION = 6  # of the argument `groups`, in all convolutions of torch.nn.functional

# Exceptions of a forward pass that receives a proxy in place of a tensor.
_TRACING_ERRORS = (
    TypeError,
    ValueError,  # fx's own TraceError is one
    RuntimeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
)


def trace(ledger: Ledger) -> str | None:
    """Follow the ledger's model symbolically, with its default arguments.

    Returns:
        None, or a phrase on why and where it cannot be traced; the ledger is unchanged then.
    """
    graph = symbolic_graph(ledger.model)
    if isinstance(graph, str):
        return graph
    _follow_graph(graph, ledger)
    return None


def symbolic_graph(model: nn.Module) -> fx.Graph | str:
    """Return the graph of a forward pass with default arguments, layers and norms kept whole.

    Returns:
        the graph, or a phrase that says why and where the model cannot be traced.
    """
    tracer = _Tracer()
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        return tracer.trace(model, concrete_args=defaults)
    except _TRACING_ERRORS as error:
        module = f"module '{tracer.running}'" if tracer.running else "its own forward"
        reason = str(error).partition(". ")[0]  # fx adds several lines
        return f"tracing stopped in {module}{_place(error)}: {reason}"


def is_traceable(model: nn.Module) -> bool:
    """Return whether the forward pass of ``model`` can be followed without an input."""
    return isinstance(symbolic_graph(model), fx.Graph)


def run(ledger: Ledger, example_input: Tensor | tuple[Tensor, ...]) -> None:
    """Follow the ledger's model while it runs on an input, through hooks that remain on it."""
    last: int | None = None
    waiting: list[Belongings] = []  # what ran before the first layer
    made_by = WeakIdKeyDictionary()  # output of a leaf module -> number of its layer

    def after_leaf(name: str, args: tuple[Any, ...], output: Any) -> None:
        nonlocal last
        number = next((made_by[arg] for arg in args if arg in made_by), last)
        for inner in ledger.layers_inside(name):
            number = last = ledger.open(inner)
        settle(number, ledger.belongings(name))
        if isinstance(output, Tensor) and number is not None:
            made_by[output] = number

    def after_container(name: str) -> None:
        settle(last, ledger.belongings(name))

    def settle(number: int | None, belongings: Belongings) -> None:
        waiting.append(belongings)
        if number is not None:
            for each in waiting:
                ledger.give(number, each)
            waiting.clear()

    leaf: str | None = None
    for name, module in ledger.modules.items():
        if leaf is not None and name.startswith(f"{leaf}." if leaf else ""):
            continue
        if is_leaf(module):
            leaf = name
            module.register_forward_hook(
                lambda _, args, output, name=name: after_leaf(name, args, output)
            )
        elif ledger.belongings(name).keys:
            module.register_forward_hook(lambda *_, name=name: after_container(name))

    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    device = next((p.device for p in ledger.model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        ledger.model(*(argument.to(device) for argument in arguments))


class _Tracer(fx.Tracer):
    """Tracer that keeps layers and norms whole and tracks the current module."""

    proxy_buffer_attributes = True  # running statistics that a forward uses by itself are seen

    def __init__(self) -> None:
        super().__init__()
        self.running = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or is_norm(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        outer, self.running = self.running, self.path_of_module(m)
        output = super().call_module(m, forward, args, kwargs)
        self.running = outer  # not reached if it fails: the innermost name stays for the message
        return output


def _follow_graph(graph: fx.Graph, ledger: Ledger) -> None:
    """Propagate the layer that ran last, and tensors without a layer so far, along the nodes."""
    source: dict[fx.Node, tuple[int, int]] = {}  # (step, number of the layer)
    waiting: dict[fx.Node, list[Belongings]] = {}
    data: set[fx.Node] = set()  # what depends on the network's input
    for step, node in enumerate(graph.nodes):
        inputs = node.all_input_nodes
        layer = max((source[i] for i in inputs if i in source), default=None)
        pending = [each for i in inputs for each in waiting.get(i, [])]
        number: int | None = None
        if node.op == "placeholder" or not data.isdisjoint(inputs):
            data.add(node)
        used = [each.layer for each in pending if each.layer is not None and node in data]
        for name in used:  # a function that reads the weight of a module acts in its place
            number = ledger.open(name)
        if node.op == "call_module":
            for inner in ledger.layers_inside(node.target):
                number = ledger.open(inner)
            pending.append(ledger.belongings(node.target))
        elif node.op == "get_attr":
            pending.append(ledger.tensor(node.target))
        elif node.op == "call_function" and node.target in LAYER_FUNCTIONS and not used:
            number = _open_functional(node, waiting, ledger)
        if number is not None:
            layer = (step, number)
        if layer is None:
            waiting[node] = pending
        else:
            source[node] = layer
            for each in pending:
                ledger.give(layer[1], each)


def _open_functional(
    node: fx.Node, waiting: dict[fx.Node, list[Belongings]], ledger: Ledger
) -> int | None:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    groups = node.kwargs.get("groups", 1)
    if len(node.args) > _GROUPS_POSITION:
        groups = node.args[_GROUPS_POSITION]
    made_of = waiting.get(weight, []) if isinstance(weight, fx.Node) else []
    kind = LAYER_FUNCTIONS[node.target]  # type: ignore[index]
    keys = [key for each in made_of for key in each.keys]
    return ledger.open_functional(keys, kind, groups if isinstance(groups, int) else 1)


def _place(error: BaseException) -> str:
    """Return the last line outside of torch and of this file, as `` (file:line)``."""
    ours = (f"{Path(torch.__file__).parent}{os.sep}", __file__)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(ours)]
    if not outside:
        return ""
    return f" ({Path(outside[-1].filename).name}:{outside[-1].lineno})"
