"""Comparison of two networks by weights, or by activations on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusion.alignment.matching import Matching
from fusion.alignment.recording import AT_ONCE, Recorder, run_on, watch
from fusion.alignment.spec import PermutationSpec
from fusion.errors import UserError
from fusion.weights import working_dtype


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

    Each tensor is divided by its root mean square, so that it counts by its number of elements,
    whatever its scale: the likelihood under noise relative to each tensor. (In a plain sum, the few
    large scales of a batch norm outweigh the thousand small weights of its layer.) The objective is
    then a mean cosine. Running statistics describe the data and are ignored, and so are tensors
    whose shapes differ (heads).
    """
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    keys = [
        key
        for key in spec.by_tensor
        if key in ours and key in theirs and ours[key].shape == theirs[key].shape
    ]
    dtype = working_dtype([*ours.values(), *theirs.values()])
    view = {key: spec.by_tensor[key][0][1].view or ours[key].shape for key in keys}
    a = {key: _of_unit_scale(ours[key], dtype, device).reshape(view[key]) for key in keys}
    b = {key: _of_unit_scale(theirs[key], dtype, device).reshape(view[key]) for key in keys}
    # A tensor of zeros agrees with nothing.
    count = {key: a[key].numel() if a[key].any() and b[key].any() else 0 for key in keys}
    total = sum(count.values())
    weight = {key: 1 / total if count[key] else 0.0 for key in keys}
    return Matching(spec, a, b, weight, seed, max_sweeps)


def by_activations(
    spec: PermutationSpec,
    models: Sequence[nn.Module],
    reference: nn.Module,
    data: Iterable[Any],
    *,
    seed: int,
    max_sweeps: int,
    device: torch.device,
) -> list[Matching]:
    """Compare the outputs of the layers whose weight makes the units of a group.

    The objective is the mean correlation of paired units over all images and pixels (Li et al.,
    1511.07543). It is written as an inner product with the identity, so that one descent serves
    both kinds of matching. Each network runs over the images once.

    Args:
        spec: The symmetries.
        models: Private copies in eval mode, which are moved to ``device``; or ``reference`` itself.
        reference: A private copy in eval mode.
        data: Batches of images, or of tuples whose first part is one; or one batch.
        seed: Order of the groups within a sweep.
        max_sweeps: Bound on the sweeps of each descent.
        device: Where to compute.

    Returns:
        For each model, its matching with the reference.

    Raises:
        UserError: ``data`` is empty or does not fit the networks, or no module makes any units.
    """
    networks = [model.to(device) for model in models]
    seen = [watch(spec, model) for model in networks]
    if spec.groups and not all(visible.by_tensor for visible, _ in seen):
        raise UserError(
            "by='activations' watches the outputs of convolution and linear modules, and none of "
            "them makes the units of a group; choose by='weights'"
        )
    matchings = []
    pairs = [(model, watched) for model, (_, watched) in zip(networks, seen, strict=True)]
    all_tables = _correlations(pairs, reference.to(device), data, device)
    for (visible, _), tables in zip(seen, all_tables, strict=True):
        eyes = {
            key: torch.eye(len(table), dtype=table.dtype, device=device)
            for key, table in tables.items()
        }
        total = sum(len(table) for table in tables.values())
        weight = dict.fromkeys(tables, 1 / max(total, 1))
        matchings.append(Matching(visible, tables, eyes, weight, seed, max_sweeps))
    return matchings


def _correlations(
    models: Sequence[tuple[nn.Module, Mapping[str, tuple[str, int]]]],
    reference: nn.Module,
    data: Iterable[Any],
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """Return for each weight (channels, channels): model's channel by reference's channel.

    Args:
        models: Each with its watched modules.
        reference: Runs once for all models; as one of them, it is compared with itself.
        data: Batches of images.
        device: Device of the networks.
    """
    moments = [{key: _Moments() for key in watched} for _, watched in models]
    everything = {key: place for _, watched in models for key, place in watched.items()}
    images = 0
    with ExitStack() as stack:
        theirs = stack.enter_context(Recorder(reference, everything))
        recorders = [
            None if model is reference else stack.enter_context(Recorder(model, watched))
            for model, watched in models
        ]
        batches = [data] if isinstance(data, Tensor) else data
        for batch in tqdm(batches, desc="activations", leave=False, disable=None):
            pictures = batch[0] if isinstance(batch, tuple | list) else batch
            for x in pictures.split(AT_ONCE):
                images += len(x)
                run_on(reference, x.to(device))
                expected = {key: theirs.take(key) for key in everything}
                for (model, watched), recorder, found in zip(
                    models, recorders, moments, strict=True
                ):
                    if recorder is not None:
                        run_on(model, x.to(device))
                    for key in watched:
                        ours = expected[key] if recorder is None else recorder.take(key)
                        found[key].add(ours, expected[key])
    if images == 0:
        raise UserError("data: no images came; activations need at least one batch")
    return [{key: moment.correlation() for key, moment in found.items()} for found in moments]


class _Moments:
    """Means, variances and covariance of two networks' channels, batch by batch."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, ours: Tensor | None, theirs: Tensor | None) -> None:
        if ours is None or theirs is None:
            return
        dtype = working_dtype([ours, theirs])
        ours, theirs = ours.to(dtype), theirs.to(dtype)
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


def _of_unit_scale(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``tensor`` divided by its root mean square; zeros as they are."""
    wide = tensor.detach().to(device).double()
    scale = float(wide.abs().max()) if wide.numel() else 0.0
    if scale == 0:
        return wide.to(dtype).contiguous()
    wide = wide / scale  # first by the largest: the squares of tiny numbers are nothing
    return (wide / wide.square().mean().sqrt()).to(dtype).contiguous()
