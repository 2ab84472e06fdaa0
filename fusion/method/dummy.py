"""Merge nothing: return the pretrained model, to evaluate it or to fine-tune it."""

from __future__ import annotations

from torch import nn

from fusion.errors import UserError
from fusion.method.base import BaseAlgorithm
from fusion.modelpool import BaseModelPool


class DummyAlgorithm(BaseAlgorithm):
    """Return the pretrained model, or the first model of a pool that has none.

    With a task pool it evaluates a model without merging anything. The members need not be
    mergeable.
    """

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        """Return the pretrained model, or the first one if there is none."""
        return modelpool.load_pretrained_or_first_model()

    def check_pool(self, modelpool: BaseModelPool) -> None:
        """Check that the pool is not empty, and that the returned model can be built.

        Raises:
            UserError: the pool is empty, or that model cannot be made.
        """
        name = modelpool.pretrained_or_first_name
        if wrong := modelpool.entry(name).check():
            raise UserError("; ".join(wrong))
