"""Algorithms that take a pool of networks and return one."""

from fusion.method.base import BaseAlgorithm
from fusion.method.dummy import DummyAlgorithm

__all__ = ["BaseAlgorithm", "DummyAlgorithm"]
