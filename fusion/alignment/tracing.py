"""The graph of a network with the shape of every value, computed without its weights."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion.alignment.nested import nested
from fusion.errors import UserError, first_line

_RESHAPING_IN_PLACE = frozenset((
    "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_", "resize_as_",
    "unflatten_", "as_strided_", "set_",
))  # fmt: skip
_CURE = "pass a permutation spec written by hand, or rewrite the forward pass"


@dataclass(frozen=True)
class Graph:
    """A traced network: ``nodes`` in the order of the forward pass and the ``value`` of each.

    Values are what the node returns for the example input, on the meta device: they have shapes and
    no contents.
    """

    module: nn.Module
    nodes: tuple[fx.Node, ...]
    value: dict[fx.Node, Any]


class _Tracer(fx.Tracer):
    """Remembers in which submodule the trace is, to name it if the trace fails."""

    where: str = ""

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        outside, self.where = self.where, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.where = outside  # not in a `finally`: after an error it must still say where
        return result


def trace(model: nn.Module, inputs: Sequence[Tensor], *, training: bool = False) -> Graph:
    """Trace a weightless copy of ``model`` and run it on the shapes of ``inputs``.

    Args:
        model: Left untouched.
        inputs: The arguments of the forward pass; only shapes matter.
        training: Follow the branches of training mode (auxiliary heads).

    Raises:
        UserError: the model cannot be traced, or the inputs do not fit.
    """
    return run_on_shapes(symbolic_trace(model, training=training), inputs)


def symbolic_trace(model: nn.Module, *, training: bool = False) -> tuple[nn.Module, fx.Graph]:
    """Return a weightless copy of ``model`` in eval mode and the graph of its forward pass.

    Raises:
        UserError: the model cannot be copied or traced.
    """
    name = type(model).__name__
    if "forward" in vars(model):
        raise UserError(
            f"{name} cannot be traced: its forward was replaced on the instance, where a trace "
            f"does not look; make a subclass with that forward (of a network from torch.compile, "
            f"give its _orig_mod)"
        )
    try:
        skeleton = _weightless(model).train(training)
    except Exception as error:  # a module may hold anything
        raise UserError(
            f"{name} cannot be copied ({first_line(error)}); remove what hangs on it, such as "
            f"torch.nn.utils.weight_norm (remove_weight_norm), and run lazy layers once"
        ) from error
    tracer = _Tracer()
    try:
        graph = tracer.trace(skeleton)
    except Exception as error:  # the user's own code runs here and may raise anything
        raise UserError(
            f"{name} cannot be traced: {_place(tracer.where, error)} "
            f"({first_line(error)}); its forward pass must not depend on the data: {_CURE}"
        ) from error
    for node in graph.nodes:
        if node.op == "call_method" and node.target in _RESHAPING_IN_PLACE:
            raise UserError(
                f"{name} cannot be traced: {node.target} changes a shape in place, after which one "
                f"name means two shapes; use {str(node.target).rstrip('_')}"
            )
        if isinstance(node.kwargs.get("device"), torch.device | str):
            node.kwargs = {**node.kwargs, "device": "meta"}
    _forget_loose_tensors(skeleton)
    # Batch norm on one image cannot run in training mode; the graph stays as it is.
    return skeleton.eval(), graph


def run_on_shapes(traced: tuple[nn.Module, fx.Graph], inputs: Sequence[Tensor]) -> Graph:
    """Run what `symbolic_trace` returned on the shapes of ``inputs``.

    Raises:
        UserError: the inputs do not fit.
    """
    skeleton, graph = traced
    name = type(skeleton).__name__
    dtype = next((p.dtype for p in skeleton.parameters() if p.is_floating_point()), torch.float32)
    inputs = [x.to("meta", dtype if x.is_floating_point() else x.dtype) for x in inputs]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    required = [node for node in placeholders if not node.args]
    if not len(required) <= len(inputs) <= len(placeholders):
        raise UserError(
            f"example_input: {name}.forward takes {len(required)} tensors, "
            f"{len(inputs)} came; give one tensor for each, as a tuple if there are several"
        )
    nodes = tuple(graph.nodes)
    try:
        with torch.device("meta"):  # for what the forward pass makes without naming a device
            return Graph(skeleton, nodes, _run(skeleton, nodes, inputs))
    except _NodeFailed as failed:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise UserError(
            f"example_input of shape {shapes} does not fit {name}: "
            f"'{failed.node.target}' fails ({first_line(failed.error)}); "
            f"give an input as the network takes it, with its batch axis, or a permutation spec "
            f"written by hand"
        ) from failed.error


class _NodeFailed(Exception):  # noqa: N818  # private, always caught above
    """One operation failed on the example input."""

    def __init__(self, node: fx.Node, error: Exception) -> None:
        super().__init__(node.name)
        self.node = node
        self.error = error


@torch.no_grad()
def _run(module: nn.Module, nodes: Sequence[fx.Node], inputs: list[Tensor]) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(module, graph=nodes[0].graph)
    interpreter.env = {}
    interpreter.args_iter = iter(inputs)
    for node in nodes:
        try:
            interpreter.env[node] = interpreter.run_node(node)
        except Exception as error:  # any operation may refuse the shapes it gets
            raise _NodeFailed(node, error) from error
    return interpreter.env


def _weightless(model: nn.Module) -> nn.Module:
    """Copy ``model`` with every parameter and buffer on the meta device; ties are kept."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _forget_loose_tensors(module: nn.Module) -> None:
    """Move to the meta device what is neither a parameter nor a buffer: plain attributes.

    Not before the trace, in which the forward pass may ask for their values, and not integers and
    masks, which may be an index.
    """
    own = vars(nn.Module()).keys()  # parameters, buffers, hooks and the like
    for part in module.modules():
        loose = {name: value for name, value in vars(part).items() if name not in own}
        vars(part).update(nested(loose, lambda t: t.to("meta") if t.is_floating_point() else t))


def _place(where: str, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "torch/fx" not in frame.filename and "alignment/tracing" not in frame.filename
    ]
    module = f"module '{where}'" if where else "the outermost module"
    outside = [frame for frame in frames if "/torch/" not in frame.filename]
    if not outside:
        return module
    return f"{module}, {outside[-1].filename}:{outside[-1].lineno}, `{outside[-1].line}`"
