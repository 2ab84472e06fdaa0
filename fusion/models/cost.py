"""Cost of a network: its parameters and the multiply-adds of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusion.models.layers import without_values
from fusion.models.multi_task import MultiTaskNetwork


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    Attributes:
        parameters: number of stored values, parameters and running statistics; shared tensors count
            once.
        multiply_adds: multiplications with an addition in convolutions and linear layers, for one
            image and every task.
    """

    parameters: int
    multiply_adds: int


def cost_of(model: nn.Module, shape: Sequence[int]) -> Cost:
    """Return the cost of a network.

    A network of several tasks answers all of them, and modules that
    :meth:`MultiTaskNetwork.outputs` runs once count once: a shared trunk, or a body with a linear
    head for each task. The cost of modules that merely hold networks (an ensemble) is the sum over
    these.

    Args:
        model: the network, or a module with the attribute ``networks``; no value is read.
        shape: of one image, (C, H, W).

    Example::

        >>> from fusion.models import CifarResNet
        >>> cost_of(CifarResNet(20), (3, 32, 32)).multiply_adds  # 40.8 million
        40813184
    """
    held = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    numbers = sum(tensor.numel() for tensor in {id(t): t for t in held}.values())
    networks = getattr(model, "networks", None)
    if isinstance(model, MultiTaskNetwork) or not isinstance(networks, nn.ModuleList):
        return Cost(numbers, _of_one_image(model, shape))
    return Cost(numbers, sum(_of_one_image(network, shape) for network in networks))


def multiply_adds(run: Callable[..., object], *inputs: Tensor) -> int:
    """Return the multiply-adds of a call: of convolutions and matrix products.

    Args:
        run: a network, or a method of one such as ``MultiTaskNetwork.outputs``.
        inputs: its arguments; on the meta device nothing is computed.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*inputs)
    return int(counter.get_total_flops()) // 2


def _of_one_image(model: nn.Module, shape: Sequence[int]) -> int:
    bare = without_values(model).eval()
    run = bare.outputs if isinstance(bare, MultiTaskNetwork) else bare
    return multiply_adds(run, torch.zeros(1, *shape, device="meta"))
