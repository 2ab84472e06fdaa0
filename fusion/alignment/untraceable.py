"""Errors on forward passes that cannot be traced."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusion.errors import UserError, first_line

_CURE = "pass a permutation spec written by hand, or rewrite the forward pass"
# Messages of torch where code outside of its dispatcher reads values of a tensor without any:
# `numpy()`, `tolist()`, copies to another device.
_WITHOUT_VALUES = ("meta device type tensor", "unallocated storage", "out of meta tensor")


class DoesNotFitError(UserError):
    """The forward pass failed on this input; on one of another shape it may not."""


class ReadsValuesError(Exception):
    """The forward pass requires the value of a tensor that has only a shape."""


class ChangesInPlaceError(Exception):
    """An operation changes a tensor in a way that cannot be rewritten."""


class OpaqueOutputError(Exception):
    """The forward pass returned an object whose tensors cannot be found."""


def check_kind(model: nn.Module) -> None:
    """Check that the operations of ``model`` can be seen.

    Raises:
        UserError: it is compiled TorchScript, or holds quantised layers.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"{name} cannot be traced: it is a TorchScript module; give the network that it was "
            f"made from"
        )
    for path, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            raise UserError(
                f"{name} cannot be traced: its layer '{path}' is quantised "
                f"({type(module).__name__}), and a symmetry of its rounded weights is not defined; "
                f"align the network before it is quantised"
            )


def explained(name: str, inputs: Sequence[Tensor], module: str, error: Exception) -> UserError:
    """Return the message for an ``error`` in the forward pass of the network ``name``.

    Args:
        name: Class of the network.
        inputs: Inputs of the forward pass.
        module: Path of the module that was running.
        error: The exception.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OpaqueOutputError):
        return UserError(
            f"{name} cannot be traced: it returns a {error}, in which no tensors are found; "
            f"return tensors in tuples, lists, dicts or dataclasses"
        )
    place = _place(module, error)
    if isinstance(error, ChangesInPlaceError):
        return UserError(
            f"{name} cannot be traced: {place}: {error} changes a tensor in place, and has no form "
            f"that does not; {_CURE}"
        )
    if isinstance(error, ReadsValuesError) or any(said in str(error) for said in _WITHOUT_VALUES):
        return UserError(
            f"{name} cannot be traced: {place}: its forward pass depends on the value of a tensor, "
            f"not only on shapes; {_CURE}"
        )
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    return DoesNotFitError(
        f"example_input of shape {shapes} does not fit {name}: {place} fails "
        f"({first_line(error)}); give an input as the network takes it, with its batch axis, or "
        f"a permutation spec written by hand"
    )


def _place(module: str, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "fusion/alignment/" not in frame.filename
    ]
    where = f"module '{module}'" if module else "the outermost module"
    outside = [frame for frame in frames if "/torch/" not in frame.filename]
    if not outside:
        return where
    return f"{where}, {outside[-1].filename}:{outside[-1].lineno}, `{outside[-1].line}`"
