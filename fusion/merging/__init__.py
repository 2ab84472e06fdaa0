"""The parts of a merge: they know pools and tensors, not folders and not configuration."""

from fusion.merging.rule import MatrixRule, Need, Piece, Rule, TaskRule, merge_tensor

__all__ = ["MatrixRule", "Need", "Piece", "Rule", "TaskRule", "merge_tensor"]
