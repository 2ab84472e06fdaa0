"""What two networks are compared by: their weights, or their activations on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from fusion.alignment.matching import Matching
from fusion.alignment.spec import Entry, PermutationSpec
from fusion.errors import UserError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def by_weights(
    spec: PermutationSpec,
    model: nn.Module,
    reference: nn.Module,
    *,
    seed: int,
    max_sweeps: int,
    device: torch.device,
) -> Matching:
    """Compare the parameters along every axis that the spec names.

    Each tensor's inner product is divided by the root mean squares of both, so that it counts by
    its number of elements, whatever its scale: the likelihood under noise relative to each tensor.
    (In a plain sum, the few large scales of a batch norm outvote the thousand small weights that
    they belong to.) The objective is then a mean cosine. Running statistics describe data, not
    the function's form, and do not count; nor do tensors whose shapes differ (heads).
    """
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    keys = [
        key
        for key in spec.by_tensor
        if key in ours and key in theirs and ours[key].shape == theirs[key].shape
    ]
    a = {key: _prepared(ours[key], device) for key in keys}
    b = {key: _prepared(theirs[key], device) for key in keys}
    scales = {key: _rms(a[key]) * _rms(b[key]) for key in keys}
    total = sum(a[key].numel() for key in keys if scales[key] > 0)
    # A tensor of zeros agrees with nothing.
    weight = {key: 1 / (scale * total) if scale > 0 else 0.0 for key, scale in scales.items()}
    return Matching(spec, a, b, weight, seed, max_sweeps)


def by_activations(
    spec: PermutationSpec,
    model: nn.Module,
    reference: nn.Module,
    data: Iterable[Any],
    *,
    seed: int,
    max_sweeps: int,
    device: torch.device,
) -> Matching:
    """Compare the outputs of the layers whose weight makes the units of a group.

    The objective is the mean correlation of paired units over all images and pixels (Li et al.,
    1511.07543). It is written as an inner product with the identity, so that one descent serves
    both kinds of matching.

    Args:
        data: Batches of images, or of tuples whose first part is one.
        model: A private copy in eval mode; it is moved to ``device``.
        reference: The same.

    Raises:
        UserError: ``data`` is empty.
    """
    outputs = _output_axes(model)
    groups = []
    for group in spec.groups:
        made = [
            Entry(entry.tensor, 0, entry.positions)  # the tables' rows are the model's channels
            for entry in group.entries
            if entry.rows is None and outputs.get(entry.tensor, ("", -1, 0))[1] == entry.axis
        ]
        groups.append(replace(group, entries=tuple(made)))
    seen = PermutationSpec(tuple(groups), spec.shapes)
    tables = _correlations(model, reference, {k: outputs[k] for k in seen.by_tensor}, data, device)
    eyes = {
        key: torch.eye(len(table), dtype=table.dtype, device=device)
        for key, table in tables.items()
    }
    channels = sum(len(table) for table in tables.values())
    weight = dict.fromkeys(tables, 1 / max(channels, 1))
    return Matching(seen, tables, eyes, weight, seed, max_sweeps)


def _correlations(
    model: nn.Module,
    reference: nn.Module,
    watched: dict[str, tuple[str, int, int]],
    data: Iterable[Any],
    device: torch.device,
) -> dict[str, Tensor]:
    """Return for each weight (channels, channels): model's channel by reference's channel."""
    moments = {key: _Moments() for key in watched}
    model.to(device)
    reference.to(device)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    images = 0
    with _Recorder(model, watched) as ours, _Recorder(reference, watched) as theirs:
        for batch in tqdm(data, desc="activations", leave=False, disable=None):
            x = batch[0] if isinstance(batch, tuple | list) else batch
            x = x.to(device=device, dtype=dtype)
            images += len(x)
            with torch.no_grad():
                model(x)
                reference(x)
            for key in watched:
                moments[key].add(ours.take(key), theirs.take(key))
    if images == 0:
        raise UserError("data: no images came; activations need at least one batch")
    return {key: moment.correlation() for key, moment in moments.items()}


class _Recorder:
    """Keeps the outputs of the watched modules as (channels, samples)."""

    def __init__(self, model: nn.Module, watched: dict[str, tuple[str, int, int]]) -> None:
        self.model = model
        self.watched = watched
        self.kept: dict[str, list[Tensor]] = {}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> _Recorder:
        for key, (name, _, axis) in self.watched.items():

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
        """Return what came since the last call; ``None`` for a module that did not run."""
        parts = self.kept.pop(key, None)
        return None if parts is None else torch.cat(parts, dim=1)


class _Moments:
    """Means, variances and covariance of two networks' channels, batch by batch."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, ours: Tensor | None, theirs: Tensor | None) -> None:
        if ours is None or theirs is None:
            return
        wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
        ours, theirs = ours.to(wide), theirs.to(wide)
        if self.count == 0:
            # Differences from the first batch's means: small numbers, so their squares keep digits.
            self.shift = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
            n, m = len(ours), len(theirs)
            self.product = torch.zeros(n, m, dtype=torch.float64, device=ours.device)
            self.sums = [self.product.new_zeros(n), self.product.new_zeros(m)]
            self.squares = [self.product.new_zeros(n), self.product.new_zeros(m)]
        a, b = ours - self.shift[0], theirs - self.shift[1]
        self.count += a.shape[1]
        for i, part in enumerate((a, b)):
            self.sums[i] += part.sum(1, dtype=torch.float64)
            self.squares[i] += part.square().sum(1, dtype=torch.float64)
        self.product += a @ b.T

    def correlation(self) -> Tensor:
        """Return the correlation; 0 where a channel does not vary."""
        means = [total / self.count for total in self.sums]
        spread = [
            (square / self.count - mean.square()).clamp(min=0).sqrt()
            for square, mean in zip(self.squares, means, strict=True)
        ]
        covariance = self.product / self.count - torch.outer(*means)
        scale = torch.outer(*spread)
        return torch.where(scale > 0, covariance / scale.clamp(min=1e-300), 0.0)


def _output_axes(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Return for each weight its module, its own output axis and the channel axis of the output."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            found[f"{name}.weight"] = (name, 0, 1 - module.weight.ndim)
        elif isinstance(module, _TRANSPOSED):
            found[f"{name}.weight"] = (name, 1, 1 - module.weight.ndim)
        elif isinstance(module, nn.Linear):
            found[f"{name}.weight"] = (name, 0, -1)
    return found


def _prepared(tensor: Tensor, device: torch.device) -> Tensor:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(device=device, dtype=wide).contiguous()


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
