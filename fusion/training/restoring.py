"""Give a module back as it came: modes, device, types and memory format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards put ``model`` back where and how it was; its values stay as the block left them.

    Restored are the train or eval mode of every module, and of every parameter and buffer the
    device, the floating-point type and the memory format.
    """
    modes = [(module, module.training) for module in model.modules()]
    layouts = [
        (module, name, tensor.device, tensor.dtype, _memory_format(tensor))
        for module in model.modules()
        for name, tensor in _own_tensors(module).items()
    ]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, device, dtype, memory_format in layouts:
            tensor = _own_tensors(module)[name]
            tensor.data = tensor.data.to(device, dtype).contiguous(memory_format=memory_format)


@contextmanager
def ready(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have ``model`` in eval mode on ``device``; restore modes, device, types and format after."""
    with restored(model):
        model.to(device)
        model.eval()
        yield


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
