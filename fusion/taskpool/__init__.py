"""Pools of tasks that measure a network."""

from fusion.taskpool.answers import Ensemble
from fusion.taskpool.base import BaseTaskPool, Contestant
from fusion.taskpool.classification import JOINT, ClassificationTaskPool

__all__ = ["JOINT", "BaseTaskPool", "ClassificationTaskPool", "Contestant", "Ensemble"]
