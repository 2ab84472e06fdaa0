"""Built-in CNNs, and the parts of any CNN: its layers in forward order and its head."""

from __future__ import annotations

from fusion.models.cifar_resnet import CifarResNet
from fusion.models.cost import Cost, cost_of, multiply_adds
from fusion.models.cut import CutNetwork
from fusion.models.head import Head, find_head
from fusion.models.head_rows import resize_head, select_rows
from fusion.models.layers import Layer, find_layers
from fusion.models.multi_task import MultiTaskNetwork
from fusion.models.separable_resnet import SeparableResNet

__all__ = [
    "CifarResNet",
    "Cost",
    "CutNetwork",
    "Head",
    "Layer",
    "MultiTaskNetwork",
    "SeparableResNet",
    "cost_of",
    "find_head",
    "find_layers",
    "multiply_adds",
    "resize_head",
    "select_rows",
]
