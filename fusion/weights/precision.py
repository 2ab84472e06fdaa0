"""The precision in which tensors are worked on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def working_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return float32, or float64 where a tensor has it: what half precisions are widened to."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
