"""The parts of a merge, on pools and tensors, independent of folders and configuration."""

from fusion.merging.rule import MatrixRule, Need, Piece, Rule, TaskRule, merge_tensor

__all__ = ["MatrixRule", "Need", "Piece", "Rule", "TaskRule", "merge_tensor"]
