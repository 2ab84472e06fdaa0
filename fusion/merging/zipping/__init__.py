"""Zipping: experts merged in a common basis of their features, whole or up to a cut."""

from fusion.merging.zipping.basis import Basis, canonical, merged_variance, of_clusters
from fusion.merging.zipping.budget import Costs, choose_cut
from fusion.merging.zipping.clusters import greedy_clusters
from fusion.merging.zipping.groups import BasisKind, GroupRecord
from fusion.merging.zipping.stage import Zipped, ZipStage

__all__ = [
    "Basis",
    "BasisKind",
    "Costs",
    "GroupRecord",
    "ZipStage",
    "Zipped",
    "canonical",
    "choose_cut",
    "greedy_clusters",
    "merged_variance",
    "of_clusters",
]
