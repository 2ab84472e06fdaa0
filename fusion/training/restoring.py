"""Restore module modes, device, dtypes and memory format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore ``model`` after the block; its values stay as the block left them.

    The train or eval mode of every module is restored, and the device, floating-point dtype and
    memory format of every parameter and buffer.
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
    """Set ``model`` to eval mode on ``device`` within the block; restore its state afterwards."""
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
