"""Run a rule over all tensors that are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fusion.merging.batch_norm import merged_statistics, statistics_keys
from fusion.merging.members import LayerChoice, Members
from fusion.merging.rule import Piece, Rule


def merge_parameters(
    members: Members,
    choice: LayerChoice,
    rule: Rule,
    *,
    with_head: bool,
    device: torch.device | str = "cpu",
    seed: int = 0,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the merged tensors of the chosen layers, on the CPU.

    Args:
        members: base and experts.
        choice: which layers, and the experts' shares.
        rule: how one tensor is merged.
        with_head: whether the head is merged like any layer.
        device: where to compute.
        seed: of everything random.
        statistics: state-dict key → name → statistics of the experts' data.
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

    plan = rule.prepare(pieces)
    state = members.network.state_dict()
    return {
        piece.key: rule.merge(piece).to("cpu", state[piece.key].dtype) for piece in pieces(plan)
    }


def merge_statistics(members: Members, choice: LayerChoice, kind: str) -> dict[str, Tensor]:
    """Return running statistics made from the experts', in the chosen layers; head excluded.

    Args:
        members: base and experts.
        choice: which layers, and the experts' shares.
        kind: ``merge`` or ``interpolate``, see `merged_statistics`.
    """
    state = members.network.state_dict()
    merged: dict[str, Tensor] = {}
    for layer in members.layers:
        if layer.name not in choice:
            continue
        for keys in statistics_keys(members.network, layer.norms):
            if keys[0] not in members.head:
                shares = choice.shares[layer.name]
                merged |= merged_statistics(keys, list(members.experts.values()), shares, kind=kind)
    return {key: tensor.to(state[key].dtype) for key, tensor in merged.items()}
