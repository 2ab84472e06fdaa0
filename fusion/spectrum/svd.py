"""Singular values in double precision, whatever the dtype, device and memory format."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float64(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as float64 without its graph, on its device if that supports float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def singular_values(matrices: Tensor) -> Tensor:
    """Return the singular values of float64 ``matrices`` (…, rows, columns) together.

    One dimension, descending, on the CPU.
    """
    # Upright on purpose: LAPACK takes 0.07 s for 4608×512 and 0.5 s for 512×4608. Eigenvalues of
    # the Gram matrix take 0.04 s, but lose every singular value below 1e-8 of the largest.
    upright = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    values: Tensor = torch.linalg.svdvals(upright)
    return values.flatten().cpu().sort(descending=True).values
