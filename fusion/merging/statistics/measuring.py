"""Prepare a network for measurements: evaluation mode, device, full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusion.training.restoring import restored
from fusion.weights import working_dtype


@contextmanager
def measured(network: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Set ``network`` to evaluation mode on ``device`` in float32 or better; restore it after.

    Half precisions are widened, because their squares overflow and underflow too early. Images are
    in the channels-last format, which avoids rearranging the layers' inputs for products.
    """
    with ExitStack() as stack:
        stack.enter_context(restored(network))
        stack.enter_context(full_precision())
        network.eval()
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(device, working_dtype([tensor]))
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield


def laid_out(images: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return a batch in the format for a network under :func:`measured`."""
    images = images.to(device, dtype)
    if images.ndim != 4:
        return images
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, where TF32 or bfloat16 is allowed."""
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv] if _HAS_SETTINGS else []
    places += [backends.mkldnn.matmul, backends.mkldnn.conv] if _HAS_SETTINGS else []
    before = [place.fp32_precision for place in places]
    matmul, convolution = "highest", False
    if not places:  # torch before 2.9
        matmul, convolution = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
        if not places:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = convolution


_HAS_SETTINGS = hasattr(torch.backends.cuda.matmul, "fp32_precision")
