"""Exact reimplementation of the notebook, so that its figures can be compared with ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusion.merging.rule import Need, Piece, Rule
from fusion.models import Layer
from fusion.spectrum import LayerSNR, notebook_score


@dataclass(frozen=True)
class NotebookTies(Rule):
    r"""The notebook's merge of two models, which it calls TIES.

    The base plus the mean of the changes where all have the same sign, and the base alone where
    they differ:

    .. math::
        \theta = \theta_0 + \frac{1}{n} \sum_i \tau_i \cdot
        [\operatorname{sign} \tau_1 = \dots = \operatorname{sign} \tau_n]

    Nothing is trimmed, and no sign wins: that is *not* TIES (arXiv 2306.01708) at any density. The
    experts' shares are ignored.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    elementwise: ClassVar[bool] = True

    def merge(self, piece: Piece) -> Tensor:
        """Return the merged tensor, (*shape)."""
        changes = piece.changes
        signs = changes.sign()
        agree = (signs == signs[0]).all(dim=0)
        return piece.reference + torch.where(agree, changes.mean(dim=0), 0.0)


def score(weight: Tensor) -> LayerSNR:
    """Return the notebook's score as the ``snr`` of a record without a noise model."""
    nothing = torch.empty(0, dtype=torch.float64)
    return LayerSNR(notebook_score(weight), 0, float("nan"), float("nan"), nothing)


def split_norms(layers: Sequence[Layer], model: nn.Module) -> tuple[Layer, ...]:
    """Return the layers, with every norm that has a weight as a separate layer."""
    state = model.state_dict()
    split: list[Layer] = []
    for layer in layers:
        norms = [name for name in layer.norms if f"{name}.weight" in state]
        owned = {
            name: [key for key in layer.tensors if key.rpartition(".")[0] == name] for name in norms
        }
        taken = {key for keys in owned.values() for key in keys}
        rest = tuple(key for key in layer.tensors if key not in taken)
        kept = tuple(name for name in layer.norms if name not in norms)
        split.append(dataclasses.replace(layer, tensors=rest, norms=kept))
        split += [
            Layer(name, f"{name}.weight", tuple(owned[name]), 1, "linear", (name,))
            for name in norms
        ]
    return tuple(split)
