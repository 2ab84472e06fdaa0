"""Record the operations of a forward pass with the shape of every value, without weights.

A copy of the network on the meta device runs once. All calls of ATen, torch's library of tensor
operations, are recorded. Whatever Python code the forward pass consists of (shape arithmetic,
hooks, parametrizations, scripted functions), it reduces to a few hundred operations with a schema
each. Operations in place are rewritten into ones that return their result (torch's
functionalization), so that one tensor means one value.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusion.alignment.copies import computed_tensors
from fusion.alignment.nested import flat, nested
from fusion.alignment.untraceable import (
    ChangesInPlaceError,
    DoesNotFitError,
    OpaqueOutputError,
    ReadsValuesError,
    check_kind,
    explained,
)
from fusion.errors import UserError, first_line

Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Call:
    """One operation.

    Attributes:
        name: Its name in ATen without the overload, such as ``convolution``; operations of other
            libraries carry theirs in front (``torchvision.roi_align``).
        run: The function that computes it.
        arguments: By the names of the schema, defaults included; tensors are distinguished by
            identity.
        result: A tensor or a tuple or list of them.
        module: Path of the module that was running, "" for the outermost.
    """

    name: str
    run: Callable[..., Any]
    arguments: Mapping[str, Any]
    result: Any
    module: str

    @property
    def why(self) -> str:
        """Description of the operation for messages: where and which."""
        return f"{self.module} ({self.name})" if self.module else self.name


@dataclass(eq=False)
class Trace:
    """The operations of one forward pass, in order.

    Attributes:
        inputs: The arguments of the forward pass.
        state: The stand-in of each tensor of the state dict, under the first of its keys.
        constants: id of the stand-in of a buffer that is not in the state dict -> the buffer.
        calls: The operations.
        outputs: Every tensor in what the forward pass returned.
    """

    inputs: list[Tensor]
    state: dict[str, Tensor]
    constants: dict[int, Tensor]
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def trace(
    model: nn.Module,
    inputs: Sequence[Tensor],
    *,
    forward: Forward | None = None,
    training: bool = False,
) -> Trace:
    """Run a weightless copy of ``model`` on the shapes of ``inputs`` and record its operations.

    Args:
        model: Left untouched.
        inputs: The arguments of the forward pass; only shapes and dtypes matter.
        forward: Called as ``forward(copy, *inputs)`` in place of the model's forward pass.
        training: Follow the branches of training mode (auxiliary heads); modules of torch itself
            stay in eval mode.

    Raises:
        DoesNotFitError: the forward pass fails on these inputs.
        UserError: the model cannot be copied, or its forward pass depends on more than shapes.
    """
    name = type(model).__name__
    check_kind(model)
    if not all(x.numel() for x in inputs):
        raise UserError(
            f"example_input has the shape {', '.join(str(tuple(x.shape)) for x in inputs)}, in "
            f"which there is nothing to follow; give one input at least"
        )
    if forward is None:
        if "forward" in vars(model):
            raise UserError(
                f"{name} cannot be traced: its forward was replaced on the instance, where a trace "
                f"does not look; make a subclass with that forward (of a network from "
                f"torch.compile, give its _orig_mod)"
            )
        _check_count(model, inputs)
    skeleton, state, constants = _skeleton(model)
    for module in skeleton.modules():
        module.training = training and not type(module).__module__.startswith("torch.nn.")
    floating = next(
        (p.dtype for p in skeleton.parameters() if p.is_floating_point()), torch.float32
    )
    inputs = [
        torch.empty_like(x, device="meta", dtype=floating if x.is_floating_point() else x.dtype)
        for x in inputs
    ]
    record = Trace(list(inputs), state, constants)
    recorder = _Recorder(record)
    run: Forward = skeleton if forward is None else lambda *xs: forward(skeleton, *xs)
    with _located(skeleton, recorder):
        try:
            record.outputs = _run(skeleton, run, inputs, recorder)
            if not record.outputs:
                raise OpaqueOutputError("value without a tensor")
        except Exception as error:  # a forward pass may raise anything
            raise explained(name, inputs, recorder.module, error) from error
    return record


def _check_count(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Check that the forward pass takes as many arguments as were given."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return
    taken = [p for p in parameters if p.kind in kinds]
    required = [p for p in taken if p.default is inspect.Parameter.empty]
    if not len(required) <= len(inputs) <= len(taken):
        raise DoesNotFitError(
            f"example_input: {type(model).__name__}.forward takes {len(required)} tensors, "
            f"{len(inputs)} came; give one tensor for each, as a tuple if there are several"
        )


# -- the run ---------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Recorder of each operation that reaches the dispatcher below functionalization."""

    def __init__(self, record: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.module = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = _by_name(func, args, kwargs or {})
        tensors = [value for value in flat(arguments) if isinstance(value, Tensor)]
        shapes_only = any(tensor.is_meta for tensor in tensors)
        name = _name(func)
        if shapes_only and _reads_values(func, arguments):
            raise ReadsValuesError
        if shapes_only and func._schema.is_mutable:  # calls that functionalization did not rewrite
            raise ChangesInPlaceError(name)
        if shapes_only:
            change = _indices_stay if name == "index" else _on_meta
            run = {key: change(value) for key, value in arguments.items()}
            if run.get("device") is not None:
                run["device"] = torch.device("meta")
            result = func(**run)
        else:
            result = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:  # else of constants, whose values are checked last
            self.record.calls.append(Call(name, func, arguments, result, self.module))
        return result


def _reads_values(func: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the result, or its shape, depends on the value of a tensor without one."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if _name(func) == "index":  # an index gives a shape, a mask does not
        indices = [index for index in arguments["indices"] if index is not None]
        return any(index.is_meta and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if arguments.get("output_size") is not None:
        return False
    return torch.Tag.dynamic_output_shape in func.tags


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {}
    for position, parameter in enumerate(func._schema.arguments):
        if position < len(args):
            arguments[parameter.name] = args[position]
        elif parameter.name in kwargs:
            arguments[parameter.name] = kwargs[parameter.name]
        elif parameter.has_default_value():
            arguments[parameter.name] = parameter.default_value
    return arguments


def _name(func: Any) -> str:
    library, _, name = func._schema.name.partition("::")
    return name if library in ("aten", "prims") else f"{library}.{name}"


def _on_meta(value: Any) -> Any:
    return nested(value, lambda tensor: tensor if tensor.is_meta else tensor.to("meta"))


def _indices_stay(value: Any) -> Any:
    if not isinstance(value, list):
        return _on_meta(value)
    return nested(value, lambda index: index if index.is_meta else index.cpu())  # a mask: a shape


@torch.no_grad()
def _run(
    skeleton: nn.Module, run: Forward, inputs: Sequence[Tensor], recorder: _Recorder
) -> list[Tensor]:
    with recorder, torch.device("meta"):  # for what the forward pass makes without a device
        torch._enable_functionalization(reapply_views=True)
        try:
            _wrap_state(skeleton)
            result = run(*map(torch._to_functional_tensor, inputs))
            outputs = list(_tensors_in(result))
            return [_unwrapped(output) for output in outputs]
        finally:
            torch._disable_functionalization()  # type: ignore[no-untyped-call]


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return the value of a tensor after all operations in place."""
    if not torch._is_functional_tensor(tensor):
        return tensor
    torch._sync(tensor)  # type: ignore[attr-defined,no-untyped-call]
    return torch._from_functional_tensor(tensor)


def _wrap_state(skeleton: nn.Module) -> None:
    """Make every parameter and buffer on the meta device one that may be changed in place."""
    wrapped: dict[int, Tensor] = {}
    for module in skeleton.modules():
        owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in owned:
            for name, tensor in own.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in wrapped:
                        wrapped[id(tensor)] = torch._to_functional_tensor(tensor)
                    own[name] = wrapped[id(tensor)]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in what a forward pass returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _tensors_in(part)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from _tensors_in(vars(value))  # a dataclass, a namespace
    elif not isinstance(value, int | float | complex | str | bytes | None):
        raise OpaqueOutputError(type(value).__name__)


class _located:  # noqa: N801  # reads as a context
    """Hooks that report the running module to the recorder."""

    def __init__(self, skeleton: nn.Module, recorder: _Recorder) -> None:
        self.outside: list[str] = []
        self.recorder = recorder
        self.modules = [
            (name, module)
            for name, module in skeleton.named_modules()
            if name and not isinstance(module, torch.jit.ScriptModule)
        ]

    def __enter__(self) -> None:
        for name, module in self.modules:

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self.outside.append(self.recorder.module)
                self.recorder.module = name

            def leave(module: nn.Module, args: Any, result: Any) -> None:
                self.recorder.module = self.outside.pop()

            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave)  # not after an error: the place must still be known

    def __exit__(self, *error: object) -> None:
        """Nothing: the hooks are those of a copy."""


# -- the copy --------------------------------------------------------------------------------------


def _skeleton(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor], dict[int, Tensor]]:
    """Copy ``model`` with its state on the meta device, ties kept; and name the copy's tensors.

    Integer and boolean buffers keep their values: they may be an index. So do tensors that are
    neither parameter nor buffer, whose values the forward pass may ask for.

    Returns:
        The copy, and `Trace.state` and `Trace.constants`.
    """
    name = type(model).__name__
    state: dict[str, Tensor] = {}
    try:
        memo: dict[int, Any] = dict(computed_tensors(model))
        for tensor in (*model.parameters(), *model.buffers()):
            if isinstance(tensor, nn.Parameter):
                empty = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            elif tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
                memo[id(tensor)] = torch.empty_like(tensor, device="meta")
            else:
                memo[id(tensor)] = tensor.detach().cpu().clone()
        seen = set()
        for key, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in memo and id(tensor) not in seen:  # not a module's extra state
                state[key] = memo[id(tensor)]
                seen.add(id(tensor))
        constants = {
            id(memo[id(buffer)]): buffer.detach()
            for buffer in model.buffers()
            if id(buffer) not in seen
        }
        return copy.deepcopy(model, memo), state, constants
    except Exception as error:  # a module may hold anything
        raise UserError(
            f"{name} cannot be copied ({first_line(error)}); remove what hangs on it, and run lazy "
            f"layers once"
        ) from error
