"""Merging rules, one per file, each a frozen dataclass over pure kernels."""

from fusion.merging.rules.consensus import ConsensusTA
from fusion.merging.rules.dare import Dare
from fusion.merging.rules.emr import EMR
from fusion.merging.rules.fisher import Fisher
from fusion.merging.rules.iso_c import IsoC
from fusion.merging.rules.iso_cts import IsoCTS
from fusion.merging.rules.least_squares import LeastSquares
from fusion.merging.rules.lines import LiNeS
from fusion.merging.rules.magmax import MagMax
from fusion.merging.rules.mean import Mean
from fusion.merging.rules.model_stock import ModelStock
from fusion.merging.rules.own_tensors import OwnTensors
from fusion.merging.rules.pcb import PCB
from fusion.merging.rules.regmean import RegMean
from fusion.merging.rules.slerp import Slerp
from fusion.merging.rules.task_arithmetic import TaskArithmetic
from fusion.merging.rules.ties import Ties
from fusion.merging.rules.tsvm import TSVM
from fusion.merging.rules.wudi import WUDI

__all__ = [
    "EMR",
    "PCB",
    "TSVM",
    "WUDI",
    "ConsensusTA",
    "Dare",
    "Fisher",
    "IsoC",
    "IsoCTS",
    "LeastSquares",
    "LiNeS",
    "MagMax",
    "Mean",
    "ModelStock",
    "OwnTensors",
    "RegMean",
    "Slerp",
    "TaskArithmetic",
    "Ties",
]
