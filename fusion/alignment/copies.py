"""Deep copies of networks, including those that hold computed tensors."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from fusion.alignment.nested import flat
from fusion.errors import UserError

Module = TypeVar("Module", bound=nn.Module)


def computed_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Return the ``memo`` of `copy.deepcopy` for tensors with a history.

    A weight that `torch.nn.utils.weight_norm` computed in the last forward pass is one: it cannot
    be copied, and is computed again in the next.
    """
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in flat(list(vars(module).values()))
        if isinstance(value, Tensor) and not value.is_leaf
    }


def copied(model: Module) -> Module:
    """Return a deep copy of ``model``.

    Raises:
        UserError: it holds a sparse tensor, which torch cannot copy.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided:
            raise UserError(f"'{name}' is a sparse tensor, which cannot be copied; make it dense")
    return copy.deepcopy(model, computed_tensors(model))
