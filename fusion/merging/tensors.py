"""Run a rule over all tensors that are merged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from fusion.merging.batch_norm import merged_statistics, statistics_keys
from fusion.merging.members import LayerChoice, Members
from fusion.merging.rule import Piece, Rule, TaskRule
from fusion.weights import tensors_of, weighted_mean
from fusion.weights.threads import threads_over_blocks

MOST_THREADS = 8  # each has the tensors of separate layers in memory
Statistics = Mapping[str, Mapping[str, Tensor]]
"""State-dict key of a layer's weight (or any tensor) → name → statistics of the experts' data."""


def merge_parameters(
    members: Members,
    choice: LayerChoice,
    rule: Rule,
    *,
    with_head: bool,
    device: torch.device | str = "cpu",
    seed: int = 0,
    statistics: Statistics | None = None,
) -> dict[str, Tensor]:
    """Return the merged tensors of the chosen layers, on the CPU.

    Args:
        members: base and experts.
        choice: which layers, and the experts' shares.
        rule: how one tensor is merged.
        with_head: whether the head is merged like any layer.
        device: where to compute.
        seed: of everything random.
        statistics: the statistics of the experts' data that the rule reads.
    """

    def pieces(plan: object = None) -> Iterator[Piece]:
        return members.pieces(
            choice,
            with_head=with_head,
            device=device,
            seed=seed,
            statistics=statistics,
            plan=plan,
        )

    return merge_pieces(rule, pieces(rule.prepare(pieces)), members, device=device)


def merge_pieces(
    rule: Rule, pieces: Iterable[Piece], members: Members, *, device: torch.device | str
) -> dict[str, Tensor]:
    """Return the merged tensors of some layers, on the CPU, as a state dict has them.

    On the CPU, threads work at different layers, unless the layers come with statistics, of which
    several might not fit the memory.

    Args:
        rule: how one tensor is merged.
        pieces: the tensors; those of a layer follow each other.
        members: base and experts.
        device: where the pieces are.
    """
    state = tensors_of(members.network)
    layers = (list(layer) for _, layer in itertools.groupby(pieces, lambda piece: piece.layer.name))
    threads = (
        nullcontext(map) if rule.statistics else threads_over_blocks(device, most=MOST_THREADS)
    )
    merged: dict[str, Tensor] = {}
    with threads as each:
        for tensors in each(partial(_merge_layer, rule, members), layers):
            merged |= {key: _like(tensor, state[key]) for key, tensor in tensors.items()}
    return merged


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to("cpu", other.dtype).view(other.shape)  # a rule sees a number as (1,)


def _merge_layer(rule: Rule, members: Members, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Return the merged tensors of one layer; weight and bias together for an affine rule.

    Where batch norm is folded into the layer, its running statistics are among them.
    """
    by_key = {piece.key: piece for piece in pieces}
    merged: dict[str, Tensor] = {}
    for weight in by_key.values() if rule.affine else ():
        bias = by_key.get(weight.bias)
        if bias is not None and weight.key == weight.layer.weight:
            merged[weight.key], merged[bias.key] = rule.merge_affine(weight, bias)
    merged |= {key: rule.merge(piece) for key, piece in by_key.items() if key not in merged}
    for key, piece in by_key.items():
        folding = members.foldings.get(piece.layer.name)
        if folding is not None and key == piece.layer.weight:
            grams = piece.statistics.get("gram")
            merged |= folding.of_map(merged[key], merged[piece.bias], grams)
    return {key: merged[key] for key in [*by_key, *merged]}


def separate_parameters(
    members: Members,
    choice: LayerChoice,
    rule: TaskRule,
    tasks: Mapping[str, Sequence[str]],
    *,
    with_head: bool,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Return task → the tensors of the chosen layers that a rule gives it, on the CPU.

    Args:
        members: base and experts.
        choice: which layers, and the experts' shares.
        rule: returns a separate tensor for each expert.
        tasks: task → its experts; several experts of one task are averaged.
        with_head: whether the head is merged like any layer.
        device: where to compute.
        seed: of everything random.
    """

    def pieces(plan: object = None) -> Iterator[Piece]:
        return members.pieces(choice, with_head=with_head, device=device, seed=seed, plan=plan)

    plan = rule.prepare(pieces)
    state = tensors_of(members.network)
    found: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    for piece in pieces(plan):
        each = dict(zip(piece.names, rule.separate(piece), strict=True))
        for task, names in tasks.items():
            mean = weighted_mean([each[name] for name in names])
            found[task][piece.key] = _like(mean, state[piece.key])
    return found


def merge_statistics(members: Members, choice: LayerChoice, kind: str) -> dict[str, Tensor]:
    """Return running statistics computed from the experts', in the chosen layers without the head.

    Args:
        members: base and experts.
        choice: which layers, and the experts' shares.
        kind: ``merge`` or ``interpolate``, see `merged_statistics`.
    """
    state = tensors_of(members.network)
    merged: dict[str, Tensor] = {}
    for layer in members.layers:
        if layer.name not in choice:
            continue
        for keys in statistics_keys(members.network, layer.norms):
            if keys[0] not in members.head:
                shares = choice.shares[layer.name]
                merged |= merged_statistics(keys, list(members.experts.values()), shares, kind=kind)
    return {key: tensor.to(state[key].dtype) for key, tensor in merged.items()}
