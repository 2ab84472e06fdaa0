"""Collect all requested statistics of one network in one pass over its images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fusion.errors import UserError, suggestion
from fusion.merging.statistics.classes import ClassMoments
from fusion.merging.statistics.fisher import FisherDiagonal
from fusion.merging.statistics.grams import Grams
from fusion.merging.statistics.measuring import laid_out, measured
from fusion.merging.statistics.norms import NormMoments
from fusion.models import Layer
from fusion.weights import exact_device, image_dtype

STATISTICS = ("gram", "fisher", "empirical_fisher", "moments", "classes")
BY_LABELS = ("empirical_fisher", "classes")  # statistics that use true labels

Batch = tuple[Tensor, Tensor]
"""Images (N, …) and labels (N,), which are numbers of the network's outputs."""


def collect(
    network: nn.Module,
    data: Iterable[Batch],
    names: Collection[str],
    *,
    layers: Sequence[Layer],
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return statistics of one network on some images, gathered in one pass over them.

    No activation is kept after its batch; the sums of all layers are in memory together.

    Args:
        network: the network; its weights, modes, device and types are the same afterwards.
        data: batches of images and labels, as :func:`fusion.data.batches` yields them.
        names: of the statistics.
        layers: the layers to measure.
        seed: of the labels that ``fisher`` draws from the network.
        device: where to compute; by default where the network is.

    Returns:
        State-dict key → name → statistic, float64 on the CPU.

    Raises:
        UserError: an unknown name, no image, or a statistic that is not finite.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in collected(network, data, names, layers=layers, seed=seed, device=device):
        name, _, key = full.partition("/")
        found.setdefault(key, {})[name] = tensor
    return found


def collected(
    network: nn.Module,
    data: Iterable[Batch],
    names: Collection[str],
    *,
    layers: Sequence[Layer],
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (``<name>/<key>``, statistic) as :func:`collect` returns them, one at a time.

    The sums of a layer, which take less memory than its Gram matrix, are freed with each.
    """
    check_names(names)
    home = next((p.device for p in network.parameters()), torch.device("cpu"))
    where = exact_device(home if device is None else device)
    gathering: dict[str, Grams | FisherDiagonal | NormMoments | ClassMoments] = {}
    seen = 0
    with measured(network, where):
        if "gram" in names:
            gathering["gram"] = Grams(network, layers)
        for name, labels in (("fisher", "model"), ("empirical_fisher", "true")):
            if name in names:
                gathering[name] = FisherDiagonal(network, layers, labels=labels, seed=seed)
        if "moments" in names:
            gathering["moments"] = NormMoments(network, layers)
        if "classes" in names:
            gathering["classes"] = ClassMoments(network, layers)
        dtype = image_dtype(network)
        for batch, truth in data:
            images = laid_out(batch, where, dtype)
            seen += len(images)
            for each in gathering.values():
                each.add(images, truth)
    if not seen:
        raise UserError("images: there is none, and statistics take at least one")
    for name, each in gathering.items():
        for key, statistic in each.finished():
            if not bool(statistic.sum().isfinite()):
                raise UserError(
                    f"the statistic '{name}' of '{key}' is not finite: activations or gradients "
                    f"overflow on these images; check how they are normalised"
                )
            yield f"{name}/{key}", statistic.cpu()


def check_names(names: Collection[str]) -> None:
    """Check that the names of statistics exist.

    Raises:
        UserError: a name is unknown.
    """
    for name in names:
        if name not in STATISTICS:
            raise UserError(
                f"statistics: there is no '{name}'{suggestion(name, STATISTICS)}; a rule may ask "
                f"for {', '.join(STATISTICS)}"
            )
