"""What a network costs: its parameters, and the multiplications of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusion.models.layers import without_values
from fusion.models.multi_task import MultiTaskNetwork


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    Attributes:
        parameters: numbers that are stored, parameters and running statistics; what is shared
            counts once.
        multiply_adds: multiplications with an addition in convolutions and linear layers, for one
            image and every task.
    """

    parameters: int
    multiply_adds: int


def cost_of(model: nn.Module, shape: Sequence[int]) -> Cost:
    """Return what a network costs.

    A network of several tasks answers all of them: its body counts once where the tasks have
    nothing but their heads apart, the trunk of networks that are cut once as well, and else the
    body once for each task. Modules that merely hold networks
    (an ensemble) cost what these cost together.

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
    if not isinstance(networks, nn.ModuleList):
        return Cost(numbers, _multiply_adds(model, shape))
    if isinstance(model, MultiTaskNetwork) and model.has_trunk():
        return Cost(numbers, _multiply_adds(model, shape))
    distinct = list({id(network): network for network in networks}.values())
    each = [_multiply_adds(network, shape) for network in distinct]
    if isinstance(model, MultiTaskNetwork) and (layer := model.own_layer()) is not None:
        heads = [network.get_parameter(f"{layer}.weight").numel() for network in distinct]
        return Cost(numbers, each[0] + sum(heads[1:]))
    return Cost(numbers, sum(each))


def _multiply_adds(model: nn.Module, shape: Sequence[int]) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        bare = without_values(model).eval()
        run = bare.outputs if isinstance(bare, MultiTaskNetwork) else bare
        run(torch.zeros(1, *shape, device="meta"))
    return int(counter.get_total_flops()) // 2
