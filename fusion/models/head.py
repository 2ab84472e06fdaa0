"""The head of a network: the part between the last features that tasks share and the outputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fusion.errors import UserError, suggestion
from fusion.models.forward_pass import LAYER_FUNCTIONS, symbolic_graph
from fusion.models.layer import is_layer
from fusion.models.layers import find_layers, without_values
from fusion.weights import tensors_of

log = logging.getLogger(__name__)

Node = TypeVar("Node", bound=Hashable)


@dataclass(frozen=True)
class Head:
    """The tensors of a network that belong to one task alone.

    Attributes:
        tensors: their state-dict keys, in the order of the state dict.
    """

    tensors: tuple[str, ...]

    def __contains__(self, key: object) -> bool:
        return key in self.tensors


def find_head(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    *,
    named: Sequence[str] | None = None,
) -> Head:
    """Return the head of a network: the last layer of each of its outputs, with what follows it.

    From every output the graph is followed backwards to the nearest convolution or linear layer;
    that layer and the normalisations and parameters on the way belong to the head. The outputs of
    the forward pass in training mode count too, which are those of auxiliary classifiers. Shapes
    are irrelevant: two heads of equal size may serve different tasks.

    Args:
        model: the network; it is not changed, and may live on the meta device.
        example_input: an input of the network. A network that cannot be traced symbolically is run
            on it, and the head is found from the graph of its gradients. Without it the last
            registered layer is taken, with a warning in the log.
        named: modules or tensors that make up the head, for networks in which features are shared
            up to another place. Nothing is searched then.

    Raises:
        UserError: ``named`` contains an unknown name, or the network has no convolution or linear
            layer.

    Example::

        >>> from fusion.models import CifarResNet
        >>> find_head(CifarResNet(8, num_classes=10)).tensors
        ('linear.weight', 'linear.bias')
    """
    if named is not None:
        return Head(_named(model, named))
    bare = without_values(model)
    found = _traced(bare.eval())
    if found is None and example_input is not None:
        found = _run(model, example_input)
    if found is None:
        last = [name for name, module in model.named_modules() if is_layer(module)][-1:]
        if not last:
            raise UserError(
                f"{type(model).__name__} has no convolution or linear layer; name its head: "
                f"head=[module]"
            )
        log.warning(
            "%s cannot be traced: its head is taken to be '%s', the last layer that was "
            "registered; if it is another, name it: head=[module]",
            type(model).__name__,
            last[0],
        )
        found = set(_named(model, last))
    elif any(not layer.reached for layer in find_layers(model, example_input)):
        found |= _traced(bare.train()) or set()
    return Head(tuple(key for key in tensors_of(model) if key in found))


def _named(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not names:
        raise UserError(f"head is {names!r}; give a list of modules or tensors, such as [fc]")
    keys = list(model.state_dict())
    modules = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for name in names:
        inside = {key for key in keys if key == name or key.startswith(f"{name}.")}
        if not inside:
            raise UserError(
                f"head: the network has no module with parameters, nor a tensor, called '{name}'"
                f"{suggestion(str(name), [*modules, *keys])}"
            )
        found |= inside
    return tuple(key for key in keys if key in found)


def _backwards(
    outputs: Iterable[Node],
    inputs_of: Callable[[Node], Iterable[Node]],
    tensors_of: Callable[[Node], set[str]],
    is_layer_node: Callable[[Node], bool],
) -> set[str]:
    """Return the tensors met on the way from the outputs to the nearest layers, these included."""
    found: set[str] = set()
    seen: set[Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        found |= tensors_of(node)
        if not is_layer_node(node):
            waiting.extend(inputs_of(node))
    return found


def _traced(model: nn.Module) -> set[str] | None:
    """Return the head's tensors from the symbolic graph; ``None`` for an untraceable network."""
    graph = symbolic_graph(model)
    if not isinstance(graph, fx.Graph):
        return None
    modules = dict(model.named_modules())
    keys = list(model.state_dict())

    def holds_layer(name: str) -> bool:
        return any(is_layer(module) for module in modules[name].modules())

    def inputs_of(node: fx.Node) -> list[fx.Node]:
        if node.op == "call_function" and node.target in LAYER_FUNCTIONS:
            # The walk ends at the layer: only the operands of its weight and bias are followed.
            data = node.args[0] if node.args else node.kwargs.get("input")
            return [parent for parent in node.all_input_nodes if parent is not data]
        return node.all_input_nodes

    def tensors_of(node: fx.Node) -> set[str]:
        if node.op == "call_module":
            return {key for key in keys if key.startswith(f"{node.target}.")}
        return {str(node.target)} & set(keys) if node.op == "get_attr" else set()

    return _backwards(
        [n for node in graph.nodes if node.op == "output" for n in node.all_input_nodes],
        inputs_of,
        tensors_of,
        lambda node: node.op == "call_module" and holds_layer(str(node.target)),
    )


def _run(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> set[str] | None:
    """Return the head's tensors from the gradient graph of one pass; ``None`` without gradients."""
    network = copy.deepcopy(model).eval()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    weights = {
        id(module.weight)
        for module in network.modules()
        if is_layer(module) and isinstance(getattr(module, "weight", None), Tensor)
    }
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with torch.enable_grad():
        outputs = network(*(a.to(device) if isinstance(a, Tensor) else a for a in arguments))
    roots = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    if not roots:
        return None

    def parameters_of(node: Any) -> Iterator[Tensor]:
        """Yield the parameters that enter a node directly, or transposed."""
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            if hasattr(parent, "variable"):
                yield parent.variable
            elif type(parent).__name__ in ("TBackward0", "TransposeBackward0"):
                yield from parameters_of(parent)

    def tensors_of(node: Any) -> set[str]:
        met = {names[id(p)] for p in parameters_of(node) if id(p) in names}
        owners = {name.rpartition(".")[0] for name in met}
        buffers = {name for name, _ in network.named_buffers() if name.rpartition(".")[0] in owners}
        return met | buffers

    found = _backwards(
        roots,
        lambda node: [parent for parent, _ in node.next_functions if parent is not None],
        tensors_of,
        lambda node: any(id(p) in weights for p in parameters_of(node)),
    )
    return found or None


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
