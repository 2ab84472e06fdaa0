"""Working precision of tensors, and a device that supports it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fusion.weights.source import TensorInfo


def working_dtype(tensors: Iterable[Tensor | TensorInfo]) -> torch.dtype:
    """Return float32, or float64 if a tensor has it; half precisions are widened to float32.

    Descriptions of tensors serve as well as tensors.

    Example::

        >>> import torch
        >>> from fusion.weights import working_dtype
        >>> working_dtype([torch.zeros(1, dtype=torch.float16)])
        torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` on the CPU in float32, or in float64 if it has that dtype.

    Example::

        >>> import torch
        >>> from fusion.weights import widened
        >>> widened(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.detach().to("cpu", working_dtype([tensor]))


def image_dtype(model: nn.Module) -> torch.dtype:
    """Return the type in which ``model`` takes images: its parameters', float32 if they differ.

    Example::

        >>> import torch
        >>> from fusion.weights import image_dtype
        >>> image_dtype(torch.nn.Linear(2, 2).half())
        torch.float16
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def exact_device(device: torch.device | str) -> torch.device:
    """Return ``device``, or the CPU for one that has no float64 (MPS), in which sums are kept.

    Example::

        >>> from fusion.weights import exact_device
        >>> exact_device("mps")
        device(type='cpu')
    """
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
