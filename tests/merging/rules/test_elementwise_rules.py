"""Rules on single entries where their papers or their references leave something open."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fusion.merging.rule import merge_tensor
from fusion.merging.rules import (
    EMR,
    PCB,
    ConsensusTA,
    Fisher,
    LiNeS,
    MagMax,
    ModelStock,
    TaskArithmetic,
    Ties,
)


def merged(rule, *changes, **options):
    zeros = torch.zeros(len(changes[0]))
    return merge_tensor(rule, [torch.tensor(change) for change in changes], zeros, **options)


def test_ties_over_the_network_spares_no_small_tensor(pieces, merge_all) -> None:
    """A tensor that hardly moved is trimmed away, unless each tensor keeps its share."""
    quiet = replace(pieces[1], experts=pieces[1].base + 1e-6 * pieces[1].changes)
    network = [pieces[0], quiet, *pieces[2:]]
    assert torch.equal(merge_all(Ties(), network)[quiet.key], quiet.base)
    assert not torch.equal(merge_all(Ties(scope="tensor"), network)[quiet.key], quiet.base)


def test_ties_keeps_all_entries_at_the_threshold() -> None:
    change = merged(Ties(density=0.25), [1.0, -1.0, 1.0, 0.5])
    assert change.tolist() == [1.0, -1.0, 1.0, 0.0]


def test_magmax_leaves_drawn_entries_at_the_base() -> None:
    rule = MagMax(scale=1.0)
    assert merged(rule, [1.0, 2.0], [-1.0, 2.0], [0.5, 1.0]).tolist() == [0.0, 2.0]
    assert merged(rule, [1.0], [-2.0], shares=[4, 1]).tolist() == [1.0]


def test_model_stock_stops_at_the_base_where_experts_oppose_each_other() -> None:
    assert merged(ModelStock(), [1.0, 0.0], [-1.0, 0.5]).tolist() == [0.0, 0.0]
    assert_close(merged(ModelStock(), [1.0, 2.0]), torch.tensor([1.0, 2.0]))


def test_pcb_weighs_entries_that_experts_agree_on() -> None:
    """Of two equal changes the one that both share counts more."""
    a, b = [1.0, 1.0, 0.2, 0.1], [1.0, -1.0, 0.1, 0.2]
    change = merged(PCB(density=0.5), a, b)
    assert change[0] == 1.0
    assert abs(float(change[1])) < 1e-6
    assert change[2:].tolist() == [0.0, 0.0]


def test_consensus_with_no_minimum_is_task_arithmetic() -> None:
    changes = [1.0, 5.0, -2.0], [3.0, -5.0, 0.0]
    plain = merged(TaskArithmetic(scale=0.5), *changes)
    assert torch.equal(merged(ConsensusTA(scale=0.5, minimum_tasks=0), *changes), plain)


def test_emr_separates_tasks_with_the_size_of_their_own_change(pieces, walk) -> None:
    plan = EMR().prepare(walk(pieces))
    own = torch.zeros(3)
    separated = torch.zeros(3)
    for piece in pieces:
        tensors = EMR().separate(replace(piece, plan=plan))
        assert tensors.shape == piece.experts.shape
        own += piece.changes.abs().flatten(1).sum(1)
        separated += (tensors - piece.base).abs().flatten(1).sum(1)
        away = (tensors - piece.base) * piece.changes
        assert (away >= -1e-12).all()
    assert_close(separated, own, rtol=1e-4, atol=1e-4)


def test_lines_moves_the_last_layer_most(pieces, merge_all) -> None:
    inner = TaskArithmetic(scale=1.0)
    plain = merge_all(inner, pieces)
    scaled = merge_all(LiNeS(rule=inner, alpha=0.2, beta=0.6), pieces)
    for piece in pieces:
        factor = 0.2 + 0.6 * piece.depth
        expected = piece.base + factor * (plain[piece.key] - piece.base)
        assert_close(scaled[piece.key], expected)
    assert {piece.depth for piece in pieces} >= {0.0, 1.0}


def test_the_first_layer_of_lines_moves_as_the_mean_does(pieces, walk) -> None:
    slope = LiNeS(rule=TaskArithmetic(scale=0.7)).prepare(walk(pieces))
    assert slope.first == pytest.approx(1 / (0.7 * 3), rel=1e-4)


def test_parameters_without_any_fisher_are_averaged() -> None:
    experts = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])]
    fisher = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    found = merge_tensor(Fisher(), experts, statistics={"fisher": fisher}, shares=[3, 1])
    assert_close(found, torch.tensor([1.5, 1.0, 3.0]), rtol=1e-4, atol=1e-4)
    empty = merge_tensor(Fisher(), experts, statistics={"fisher": torch.zeros(2, 3)})
    assert_close(empty, torch.full((3,), 2.0))


def test_an_expert_with_a_larger_loss_does_not_outweigh_the_others() -> None:
    experts = [torch.tensor([0.0, 0.0]), torch.tensor([4.0, 4.0])]
    fisher = torch.tensor([[1.0, 3.0], [300.0, 100.0]])
    loud = merge_tensor(Fisher(normalise=False), experts, statistics={"fisher": fisher})
    assert (loud > 3.8).all()
    fair = merge_tensor(Fisher(), experts, statistics={"fisher": fisher})
    assert_close(fair, torch.tensor([3.0, 1.0]))
