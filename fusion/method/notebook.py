"""The student's notebook to the letter, kept so that its figures can be compared with ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusion.models import Layer
from fusion.spectrum import LayerSNR, notebook_score

# The notebook merges two models without trimming: where their changes differ in sign the larger
# one wins, else they are averaged. That is TIES with everything kept.
TIES_DENSITY = 1.0


def score(weight: Tensor) -> LayerSNR:
    """Return the notebook's score as the ``snr`` of a record that knows no noise model."""
    nothing = torch.empty(0, dtype=torch.float64)
    return LayerSNR(notebook_score(weight), 0, float("nan"), float("nan"), nothing)


def split_norms(layers: Sequence[Layer], model: nn.Module) -> tuple[Layer, ...]:
    """Return the layers with every norm that has a weight as a layer of its own."""
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
