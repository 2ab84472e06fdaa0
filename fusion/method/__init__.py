"""Algorithms that take a pool of networks and return one."""

from fusion.method.adamerging import AdaMerging
from fusion.method.base import BaseAlgorithm
from fusion.method.benchmark_controls import BenchmarkControls
from fusion.method.benchmarked import Benchmarked
from fusion.method.dummy import DummyAlgorithm
from fusion.method.git_rebasin import GitReBasin
from fusion.method.interpolation_barrier import InterpolationBarrier
from fusion.method.merge import Merge
from fusion.method.search import Search
from fusion.method.snr_selective_merge import SNRSelectiveMerge
from fusion.method.task_vector_cos_similarity import TaskVectorCosSimilarity
from fusion.method.task_vector_violin_plot import TaskVectorViolinPlot
from fusion.method.zipit import ZipIt

__all__ = [
    "AdaMerging",
    "BaseAlgorithm",
    "BenchmarkControls",
    "Benchmarked",
    "DummyAlgorithm",
    "GitReBasin",
    "InterpolationBarrier",
    "Merge",
    "SNRSelectiveMerge",
    "Search",
    "TaskVectorCosSimilarity",
    "TaskVectorViolinPlot",
    "ZipIt",
]
