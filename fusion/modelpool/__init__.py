"""Pools of networks and the kinds of member they hold."""

from fusion.modelpool.base import PRETRAINED, BaseModelPool, as_modelpool
from fusion.modelpool.checkpoint import Checkpoint
from fusion.modelpool.member import Member
from fusion.modelpool.trained import TrainedModel

__all__ = ["PRETRAINED", "BaseModelPool", "Checkpoint", "Member", "TrainedModel", "as_modelpool"]
