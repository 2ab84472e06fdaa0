"""What DARE drops: seeded by names and positions, rescaled, then anybody's rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusion.merging.rule import Need, merge_tensor
from fusion.merging.rules import TSVM, Dare, Fisher, MagMax, RegMean, TaskArithmetic, Ties

INNER = [TaskArithmetic(), Ties(), TSVM(), RegMean(), Fisher()]
inner = pytest.mark.parametrize("rule", INNER, ids=lambda rule: type(rule).__name__)


@inner
def test_with_density_1_it_is_its_inner_rule(rule, pieces, merge_all) -> None:
    merged, plain = merge_all(Dare(rule=rule, density=1.0), pieces), merge_all(rule, pieces)
    assert all(torch.equal(merged[key], plain[key]) for key in plain)


@inner
def test_it_asks_for_what_its_inner_rule_asks_for(rule) -> None:
    dare = Dare(rule=rule)
    assert dare.needs == rule.needs | {Need.BASE}
    assert (dare.statistics, dare.elementwise, dare.affine) == (
        rule.statistics,
        rule.elementwise,
        rule.affine,
    )


def test_a_share_of_the_entries_is_kept_and_rescaled() -> None:
    base, expert = torch.zeros(200, 500), torch.full((200, 500), 0.5)
    rule = Dare(rule=TaskArithmetic(scale=1.0), density=0.2)
    merged = merge_tensor(rule, [expert], base)
    assert set(merged.unique().tolist()) == {0.0, 2.5}
    assert float((merged != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(merged.mean()) == pytest.approx(0.5, abs=0.02)


def test_seeds_experts_and_tensors_have_masks_of_their_own(pieces) -> None:
    rule = Dare(rule=TaskArithmetic(scale=1.0), density=0.5)
    piece = pieces[0]
    alone = {
        name: replace(piece, experts=piece.experts[:1], names=(name,), shares=(1.0,))
        for name in ("a", "b")
    }
    variants = [
        alone["a"],
        alone["b"],
        replace(alone["a"], seed=1),
        replace(alone["a"], key="other.weight"),
    ]
    masks = [rule.merge(variant) != variant.base for variant in variants]
    for index, mask in enumerate(masks):
        assert all(not torch.equal(mask, other) for other in masks[:index])
    assert torch.equal(rule.merge(alone["a"]), rule.merge(alone["a"]))


def test_the_inner_rule_prepares_on_what_is_left(pieces, walk) -> None:
    """The thresholds of TIES over the network are those of the sparse, rescaled task vectors."""
    alone = Dare(rule=TaskArithmetic(scale=1.0), density=0.5)
    sparse = []
    for piece in pieces:
        experts = [
            alone.merge(replace(piece, experts=expert[None], names=(name,), shares=(1.0,)))
            for expert, name in zip(piece.experts, piece.names, strict=True)
        ]
        sparse.append(replace(piece, experts=torch.stack(experts)))
    expected = Ties(density=0.2).prepare(walk(sparse))
    found = Dare(rule=Ties(density=0.2), density=0.5).prepare(walk(pieces))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(Ties(density=0.2).prepare(walk(pieces)), rel=1e-2)


def test_merging_one_expert_by_magmax_leaves_dropped_entries_at_the_base(normal) -> None:
    base, expert = normal(40, of="base"), normal(40, of="expert")
    merged = merge_tensor(Dare(rule=MagMax(scale=1.0), density=0.5), [expert], base)
    dropped = merged == base
    assert 5 < int(dropped.sum()) < 35
    torch.testing.assert_close(merged[~dropped] - base[~dropped], 2 * (expert - base)[~dropped])
