"""Algorithms that take a pool of networks and return one."""

from fusion.method.base import BaseAlgorithm
from fusion.method.dummy import DummyAlgorithm
from fusion.method.snr_selective_merge import SNRSelectiveMerge

__all__ = ["BaseAlgorithm", "DummyAlgorithm", "SNRSelectiveMerge"]
