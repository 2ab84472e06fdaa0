"""Pools of tasks that measure a network."""

from fusion.taskpool.base import BaseTaskPool
from fusion.taskpool.classification import ClassificationTaskPool

__all__ = ["BaseTaskPool", "ClassificationTaskPool"]
