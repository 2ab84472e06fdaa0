"""Inner products of long vectors, summed block by block in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements of each vector in one block: a few vectors of it stay in the cache


def gram_matrix(tensors: Sequence[Tensor]) -> Tensor:
    """Return the matrix of inner products of ``tensors`` as flat vectors.

    Args:
        tensors: n tensors with equally many elements, of any dtype and memory format.

    Returns:
        A float64 tensor (n, n) on the device of the first tensor. Products and sums are formed
        in float64, a block at a time, so that no float64 copy of a whole tensor is ever made.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].numel(), BLOCK):
        block = torch.stack([vector[start : start + BLOCK].double() for vector in flat])
        gram += block @ block.T
    return gram
