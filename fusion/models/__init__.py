"""The CNNs of ours, and what every CNN is made of: its layers in forward order and its head."""

from __future__ import annotations

from fusion.models.cifar_resnet import CifarResNet
from fusion.models.heads import head_names, slice_head
from fusion.models.layers import Layer, find_layers
from fusion.models.separable_resnet import SeparableResNet

__all__ = ["CifarResNet", "Layer", "SeparableResNet", "find_layers", "head_names", "slice_head"]
