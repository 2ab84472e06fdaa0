"""A whole network merged tensor by tensor, and single layers with statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fusion.data import seed_from
from fusion.merging.rule import Piece, Rule
from fusion.models import find_layers


def draw(*shape: int, of: str) -> Tensor:
    """Normal numbers that depend on a name only."""
    generator = torch.Generator().manual_seed(seed_from(of) % 2**31)
    return torch.randn(shape, generator=generator)


def gram_of(name: str, groups: int, columns: int, rows: int = 40) -> Tensor:
    """The Gram matrices of random inputs and a constant, (groups, columns + 1, columns + 1).

    Every fifth input never occurs, as behind a dead channel.
    """
    inputs = draw(groups, rows, columns + 1, of=name).double()
    inputs[..., ::5] = 0
    inputs[..., -1] = 1
    return inputs.mT @ inputs / rows


def network_pieces(
    base: nn.Module, experts: Mapping[str, nn.Module], *, shares: Sequence[float] | None = None
) -> list[Piece]:
    """The parameters of a network, with statistics that depend on stripped names only."""
    data = [name.strip() for name in experts]
    layers = find_layers(base)
    parameters = dict(base.named_parameters())
    states = {name: expert.state_dict() for name, expert in experts.items()}
    pieces = []
    for number, layer in enumerate(layers):
        for key in layer.tensors:
            if key not in parameters:
                continue
            piece = Piece(
                key=key,
                layer=layer,
                depth=number / (len(layers) - 1),
                base=base.state_dict()[key],
                experts=torch.stack([state[key] for state in states.values()]),
                names=tuple(experts),
                shares=tuple(shares or [1 / len(experts)] * len(experts)),
            )
            shape = piece.experts.shape[1:]
            statistics = {
                "fisher": torch.stack([draw(*shape, of=f"F {n} {key}").square() for n in data])
            }
            if key == layer.weight:
                columns = piece.matrices(piece.experts).shape[-1]
                grams = [gram_of(f"G {n} {key}", layer.groups, columns) for n in data]
                statistics["gram"] = torch.stack(grams)
            pieces.append(replace(piece, statistics=statistics))
    return pieces


def merge_pieces(rule: Rule, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Merge the parameters of a network as the contract of a rule has it."""
    plan = rule.prepare(lambda: iter(pieces))
    pieces = [replace(piece, plan=plan) for piece in pieces]
    merged: dict[str, Tensor] = {}
    for piece in pieces:
        bias = [p for p in pieces if p.layer is piece.layer and p.key == f"{piece.layer.name}.bias"]
        if rule.affine and piece.key == piece.layer.weight and bias:
            merged[piece.key], merged[bias[0].key] = rule.merge_affine(piece, bias[0])
        elif piece.key not in merged:
            merged[piece.key] = rule.merge(piece)
    return merged


@pytest.fixture
def merge_network() -> Callable[..., dict[str, Tensor]]:
    """Merge base and experts (name → network) by a rule."""

    def merge(rule: Rule, base: nn.Module, experts: Mapping[str, nn.Module], **options: object):
        return merge_pieces(rule, network_pieces(base, experts, **options))

    return merge


@pytest.fixture(scope="session")
def built() -> dict[str, list[Piece]]:
    """What has been built for an earlier test; pieces are never written to."""
    return {}


@pytest.fixture
def pieces(request: pytest.FixtureRequest, built: dict[str, list[Piece]]) -> list[Piece]:
    """The parameters of a small ResNet and three experts of it."""
    if not built:
        base, peers = (request.getfixturevalue(name) for name in ("base", "peers"))
        built["pieces"] = network_pieces(base, peers)
    return list(built["pieces"])


@pytest.fixture
def merge_all() -> Callable[..., dict[str, Tensor]]:
    return merge_pieces


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    return draw


@pytest.fixture
def gram() -> Callable[..., Tensor]:
    return gram_of


@pytest.fixture
def walk() -> Callable[..., Callable[[], Iterator[Piece]]]:
    """What a rule's ``prepare`` is given."""
    return lambda pieces: lambda: iter(pieces)
