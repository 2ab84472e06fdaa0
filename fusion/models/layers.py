"""The layers of a network, found in the order of its forward pass."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.models import forward_pass
from fusion.models.layer import Layer, Ledger
from fusion.weights import tensors_of

__all__ = ["Layer", "find_layers"]

log = logging.getLogger(__name__)


def find_layers(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...] | None = None
) -> tuple[Layer, ...]:
    """Return the layers of a network in the order of its forward pass in evaluation mode.

    Every key of ``model.state_dict()`` belongs to exactly one layer. A norm or a plain parameter
    belongs to the convolution or linear module that ran last among its ancestors in the graph;
    without such an ancestor, to the first one that uses it. Tied tensors count once, where they are
    first used. Modules that the forward pass does not reach come last, as registered.

    The order is found by symbolic tracing: the model is neither run nor changed, and may live on
    the meta device. A network that cannot be traced is run once, as a copy, on ``example_input``;
    there a norm belongs to the layer whose output it received or, if something came between them,
    to the layer that ran last.

    Args:
        model: the network.
        example_input: arguments of its ``forward``, used only if it cannot be traced.

    Raises:
        UserError: if the network has no convolution or linear layer, or cannot be traced and
            comes without an example input.
    """
    ledger = Ledger(without_values(model).eval())
    obstacle = forward_pass.trace(ledger)
    if obstacle is not None:
        name = type(model).__name__
        if example_input is None:
            raise UserError(
                f"find_layers: {name} cannot be followed without an input, {obstacle}; "
                "give one: find_layers(model, example_input=images)"
            )
        log.debug("find_layers runs %s, because %s", name, obstacle)
        ledger = Ledger(copy.deepcopy(model).eval())
        forward_pass.run(ledger, example_input)
    return ledger.close()


def without_values(model: nn.Module, keys: Collection[str] | None = None) -> nn.Module:
    """Return a copy of a model on the meta device, ties included; its values are never copied.

    Args:
        model: the model.
        keys: state-dict keys of the tensors that lose their values; by default everything does,
            buffers that are not part of the state dict included.
    """
    if keys is None:
        tensors = list(itertools.chain(model.parameters(), model.buffers()))
    else:
        held = tensors_of(model, keep_vars=True)
        tensors = [held[key] for key in keys]
    return with_tensors(model, [(old, torch.empty_like(old, device="meta")) for old in tensors])


def with_tensors(model: nn.Module, replaced: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """Return a copy of a model with other tensors in the place of some, wherever these occur.

    Args:
        model: the model; everything else in it is copied.
        replaced: parameters or buffers of the model, and what takes their place: the tensor itself,
            not a copy. A parameter stays a parameter.
    """
    memo: dict[int, object] = {}
    for old, new in replaced:
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        memo[id(old)] = new
    return copy.deepcopy(model, memo)
