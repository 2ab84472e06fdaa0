"""Training through Fabric, freezing of layers, recalibration of batch norm."""

from fusion.training.channel_statistics import channel_statistics
from fusion.training.finetuning import FineTuned, FineTuning
from fusion.training.fitting import fit
from fusion.training.freezing import Frozen, freeze
from fusion.training.history import Epoch, History, Scores
from fusion.training.measuring import Measurement, measure
from fusion.training.recalibration import recalibrate_batch_norm
from fusion.training.repair import MemberStatistics, repair

__all__ = [
    "Epoch",
    "FineTuned",
    "FineTuning",
    "Frozen",
    "History",
    "Measurement",
    "MemberStatistics",
    "Scores",
    "channel_statistics",
    "fit",
    "freeze",
    "measure",
    "recalibrate_batch_norm",
    "repair",
]
