"""The graph of a network with the shape of every value, computed without its weights."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion.errors import UserError

_CURE = "pass a permutation spec written by hand, or rewrite the forward pass"


@dataclass(frozen=True)
class Graph:
    """A traced network: ``nodes`` in the order of the forward pass and the ``value`` of each.

    Values are what the node returns for the example input, on the meta device where possible: use
    their shapes, not their contents.
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
    skeleton = _weightless(model).train(training)
    tracer = _Tracer()
    try:
        graph = tracer.trace(skeleton)
    except Exception as error:  # the user's own code runs here and may raise anything
        raise UserError(
            f"{type(model).__name__} cannot be traced: {_place(tracer.where, error)} "
            f"({_first_line(error)}); its forward pass must not depend on the data: {_CURE}"
        ) from error
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    required = [node for node in placeholders if not node.args]
    if not len(required) <= len(inputs) <= len(placeholders):
        raise UserError(
            f"example_input: {type(model).__name__}.forward takes {len(required)} tensors, "
            f"{len(inputs)} came; give one tensor for each, as a tuple if there are several"
        )
    skeleton.eval()  # batch norm on one image cannot run in training mode; the graph stays as it is
    nodes = tuple(graph.nodes)
    try:
        values = _run(skeleton, nodes, [x.to("meta") for x in inputs])
    except _NodeFailed as failed:
        if not _has_loose_tensors(skeleton):
            raise _misfit(model, inputs, failed) from failed.__cause__
        # Tensors that are neither parameters nor buffers kept their device: run the real network.
        skeleton = copy.deepcopy(model).eval()
        with torch.no_grad():
            try:
                values = _run(skeleton, nodes, list(inputs))
            except _NodeFailed as again:
                raise _misfit(model, inputs, again) from again.__cause__
    return Graph(skeleton, nodes, values)


class _NodeFailed(Exception):  # noqa: N818  # private, always caught above
    """One operation failed on the example input."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


def _misfit(model: nn.Module, inputs: Sequence[Tensor], failed: _NodeFailed) -> UserError:
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    assert failed.__cause__ is not None
    return UserError(
        f"example_input of shape {shapes} does not fit {type(model).__name__}: "
        f"'{failed.node.target}' fails ({_first_line(failed.__cause__)}); "
        f"give an input as the network takes it, with its batch axis"
    )


def _run(module: nn.Module, nodes: Sequence[fx.Node], inputs: list[Tensor]) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(module, graph=nodes[0].graph)
    interpreter.env = {}
    interpreter.args_iter = iter(inputs)
    for node in nodes:
        try:
            interpreter.env[node] = interpreter.run_node(node)
        except Exception as error:  # any operation may refuse the shapes it gets
            raise _NodeFailed(node) from error
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


def _has_loose_tensors(module: nn.Module) -> bool:
    return any(
        isinstance(value, Tensor) and not value.is_meta
        for part in module.modules()
        for value in vars(part).values()
    )


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
