"""Coefficients of task arithmetic learned without labels: AdaMerging."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from fusion.data import seed_from
from fusion.merging.members import LayerChoice, Members
from fusion.modelpool import BaseModelPool
from fusion.training.sampling import Images, sample_images
from fusion.weights import image_dtype, tensors_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coefficients:
    """Result of the adaptation.

    Attributes:
        values: (layers or 1, experts): λ of each expert in each layer.
        layers: names of the layers, one for each row; a single empty name for all of them.
        losses: mean entropy in nats, one for each step.
    """

    values: Tensor
    layers: tuple[str, ...]
    losses: tuple[float, ...]


def adapt_coefficients(
    network_of: Callable[[str], nn.Module],
    members: Members,
    choice: LayerChoice,
    modelpool: BaseModelPool,
    *,
    with_head: bool,
    per_layer: bool,
    initial: float,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: bool | None = None,
) -> Coefficients:
    r"""Return the coefficients that minimise the merged network's entropy on the experts' images.

    .. math::
        \min_\lambda \sum_t \mathbb{E}_{x \sim D_t} H\bigl(p(y \mid x; \theta(\lambda))\bigr),
        \qquad \theta_l(\lambda) = \theta_{0,l} + \sum_i \lambda_{l,i} \tau_{i,l}

    Adam minimises the entropy of the predictions on unlabelled training images of each task, with
    the task's own head. The network stays in evaluation mode: its buffers, including running
    statistics, are read and never written.

    Args:
        network_of: task → a network whose buffers and head are used; its parameters are replaced.
        members: base and experts.
        choice: the layers that are merged.
        modelpool: has the images of each task.
        with_head: whether the head is merged like any layer.
        per_layer: one coefficient for each
            expert in each layer, instead of one in all layers.
        initial: initial value of all coefficients.
        steps: of Adam.
        learning_rate: learning rate of Adam.
        batch_size: images of each task in a step.
        seed: of the order of the images.
        device: where to compute.
        progress: whether to show a progress bar; ``None`` shows it where there is a terminal.
    """
    base, changes, rows, layers = _task_vectors(members, choice, with_head, per_layer, device)
    start = torch.full((len(layers), len(members.names)), initial, device=device)
    values = nn.Parameter(start)
    optimizer = torch.optim.Adam([values], lr=learning_rate, betas=(0.9, 0.999))
    networks = {t: copy.deepcopy(network_of(t)).eval().to(device) for t in modelpool.tasks}
    for network in networks.values():
        network.requires_grad_(False)
    streams = {
        task: _endless(modelpool.images(names), batch_size, seed_from(seed, "adapt", task), device)
        for task, names in modelpool.tasks.items()
    }
    losses = []
    hidden = None if progress is None else not progress
    for _ in tqdm(range(steps), desc="Adapting coefficients", unit="step", disable=hidden):
        parameters = {
            key: base[key] + torch.tensordot(values[rows[key]], changes[key], dims=1)
            for key in base
        }
        loss = values.new_zeros(())
        for task, network in networks.items():
            images = next(streams[task]).to(image_dtype(network))
            own = {key: _like(t, network.get_parameter(key)) for key, t in parameters.items()}
            scores = functional_call(network, own, (images,)).float()
            shares = scores.log_softmax(1)
            loss = loss - (shares.exp() * shares).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()) / len(networks))
    return Coefficients(values.detach().cpu(), layers, tuple(losses))


def merge_with_coefficients(
    coefficients: Coefficients,
    members: Members,
    choice: LayerChoice,
    *,
    with_head: bool,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the merged tensors for given coefficients, on the CPU."""
    per_layer = coefficients.layers != ("",)
    base, changes, rows, _ = _task_vectors(members, choice, with_head, per_layer, device)
    values = coefficients.values.to(device)
    state = tensors_of(members.network)
    return {
        key: (base[key] + torch.tensordot(values[rows[key]], changes[key], dims=1))
        .to("cpu", state[key].dtype)
        .view(state[key].shape)
        for key in base
    }


def _task_vectors(
    members: Members,
    choice: LayerChoice,
    with_head: bool,
    per_layer: bool,
    device: torch.device,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, int], tuple[str, ...]]:
    """Return key → base, key → changes (n, *shape), key → row of its coefficients, row names."""
    base: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    layers: dict[str, int] = {}
    for piece in members.pieces(choice, with_head=with_head, device=device):
        base[piece.key] = piece.reference.float()
        changes[piece.key] = piece.changes.float()
        name = piece.layer.name if per_layer else ""
        rows[piece.key] = layers.setdefault(name, len(layers))
    return base, changes, rows, tuple(layers)


def _endless(data: Images, batch_size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    turn = 0
    while True:
        yield from sample_images(
            data,
            images=2**62,
            batch_size=batch_size,
            seed=seed_from(seed, turn),
            device=device,
        )
        turn += 1


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(other.dtype).view(other.shape)
