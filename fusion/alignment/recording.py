"""Record the outputs of the layers that make the units of a group while a network runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fusion.alignment.spec import Entry, Group, PermutationSpec
from fusion.errors import UserError, first_line
from fusion.weights import image_dtype

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AT_ONCE = 32  # images per forward pass: all watched outputs of several networks are held for one


def watch(
    spec: PermutationSpec, model: nn.Module
) -> tuple[PermutationSpec, dict[str, tuple[str, int]]]:
    """Return the spec on the recorded channels, and the watched modules.

    Returns:
        The groups, each entry on axis 0 of a table of the module's output channels; and for each
        weight its module and the channel axis of the module's output.
    """
    outputs = outputs_of(model)
    groups = []
    for group in spec.groups:
        made = []
        for entry in group.entries:
            if entry.tensor in outputs:
                channels = _channels(entry, group, model.get_submodule(outputs[entry.tensor][0]))
                if channels is not None:
                    made.append(Entry(entry.tensor, 0, channels))  # rows: the model's channels
        groups.append(replace(group, entries=tuple(made)))
    seen = PermutationSpec(tuple(groups), spec.shapes)
    return seen, {key: outputs[key] for key in seen.by_tensor}


@torch.no_grad()
def run_on(model: nn.Module, x: Tensor) -> None:
    """Run a network and discard its output.

    Raises:
        UserError: the images do not fit.
    """
    try:
        model(x.to(image_dtype(model)))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"data: images of shape {tuple(x.shape)} do not fit {type(model).__name__} "
            f"({first_line(error)}); give batches as the network takes them, (N, C, H, W)"
        ) from error


class Recorder:
    """Recorder of the outputs of the watched modules as (channels, samples)."""

    def __init__(self, model: nn.Module, watched: Mapping[str, tuple[str, int]]) -> None:
        self.model = model
        self.watched = watched
        self.kept: dict[str, list[Tensor]] = {}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for key, (name, axis) in self.watched.items():

            def keep(
                module: nn.Module, args: Any, output: Tensor, key: str = key, axis: int = axis
            ) -> None:
                # A copy in any case: the next operation may work in place (`ReLU(inplace=True)`).
                rows = output.detach().movedim(axis, 0).clone(memory_format=torch.contiguous_format)
                self.kept.setdefault(key, []).append(rows.flatten(1))

            self.handles.append(self.model.get_submodule(name).register_forward_hook(keep))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def take(self, key: str) -> Tensor | None:
        """Return the outputs since the last call; ``None`` for a module that did not run."""
        parts = self.kept.pop(key, None)
        return None if parts is None else torch.cat(parts, dim=1)


def outputs_of(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Return for each weight its module and the channel axis of the module's output."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            axis = -1 if isinstance(module, nn.Linear) else 1 - module.weight.ndim
            for key, tensor in module.state_dict().items():
                # Under a parametrization (weight norm), the tensor that it starts from.
                if "weight" in key and tensor.shape == module.weight.shape:
                    found[f"{name}.{key}" if name else key] = (name, axis)
    return found


def _channels(entry: Entry, group: Group, module: nn.Module) -> Tensor | None:
    """Return the output channels of ``module`` that an entry on its weight stands for.

    None: the entry is on the weight's inputs. A grouped transposed convolution holds its outputs
    group by group along axis 1; its blocks are identified by the inputs that move with them.
    """
    if not isinstance(module, TRANSPOSED):
        return entry.positions if entry.axis == 0 else None
    rows, width = module.in_channels // module.groups, module.out_channels // module.groups
    if module.groups == 1:
        return entry.positions if entry.axis == 1 else None
    if entry.rows is not None:
        return entry.positions + entry.rows[0] // rows * width
    if rows == width == 1:  # depthwise
        return entry.positions
    if group.members:
        return entry.positions[:, :1] // rows * width + torch.arange(width, device="cpu")
    return None
