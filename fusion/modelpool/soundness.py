"""Checks for networks that cannot be members of a pool, with remedies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from fusion.errors import UserError, first_line
from fusion.models.layers import without_values

# Hooks of torch.nn.utils that compute a weight before each pass from separate tensors.
_COMPUTED = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "BasePruningMethod": "torch.nn.utils.prune.remove",
}
_COPY_ERRORS = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of ``torch.compile`` and data parallelism."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, DataParallel | DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def require_sound(name: str, module: nn.Module, *, filled: bool = True) -> None:
    """Check that a network has plain values that can be copied, compared and saved.

    Args:
        name: name of the network in the error.
        module: the network.
        filled: whether it has its
            values; otherwise they are loaded later, and it may be on the meta device.

    Raises:
        UserError: the network cannot be a member.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"model '{name}' is a TorchScript module, whose graph is fixed; pass the Python module "
            f"that it was made from"
        )
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if (why := _odd_tensor(tensor, filled)) is not None:
            raise UserError(f"model '{name}': '{key}' {why}")
    for path, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            kinds = {cls.__name__ for cls in type(hook).__mro__}
            for kind in kinds & _COMPUTED.keys():
                raise UserError(
                    f"model '{name}': the weight of '{path}' is computed before each pass by a "
                    f"hook ({type(hook).__name__}); make it a plain weight first: "
                    f"{_COMPUTED[kind]}"
                )


def require_mergeable(name: str, module: nn.Module) -> None:
    """Check that the layers of a network compute with its parameters directly.

    Args:
        name: name of the network in the error.
        module: the network, which may be on the meta
            device.

    Raises:
        UserError: a layer is parametrized, or a parameter is complex.
    """
    for path, part in module.named_modules():
        if torch.nn.utils.parametrize.is_parametrized(part):
            raise UserError(
                f"model '{name}': '{path}' is parametrized, so that the mean of its parameters is "
                f"not that of its weights; make the weights plain first: "
                f"torch.nn.utils.parametrize.remove_parametrizations"
            )
    for key, tensor in module.named_parameters():
        if tensor.is_complex():
            raise UserError(
                f"model '{name}': '{key}' is complex, and merging rules are for real numbers; "
                f"keep it as two real parameters"
            )


def deep_copy(name: str, module: nn.Module, *, values: bool = True) -> nn.Module:
    """Return a copy of a network.

    Args:
        name: name of the network in the error.
        module: the network.
        values: whether its values are
            copied, or only its structure, onto the meta device.

    Raises:
        UserError: something in it cannot be copied.
    """
    try:
        return copy.deepcopy(module) if values else without_values(module)
    except _COPY_ERRORS as error:
        raise UserError(
            f"model '{name}' holds something that cannot be copied ({first_line(error)}); remove "
            f"it, or pass a function that makes the network"
        ) from error


def _odd_tensor(tensor: Tensor, filled: bool) -> str | None:
    if is_lazy(tensor):
        return "has no shape yet; run the network once on an image"
    if tensor.is_meta and filled:
        return "lies on the meta device and has no values; load its weights first"
    if tensor.layout != torch.strided:
        return f"is stored as {tensor.layout}; make it dense: tensor.to_dense()"
    if tensor.is_quantized:
        return "is quantised; pass the network as it was before quantisation"
    if tensor.is_floating_point() and tensor.element_size() < 2:
        return f"has the type {tensor.dtype}, in which nothing can be computed; use bfloat16"
    return None
