"""The multiply-adds of trunk and tails, counted, stay within the budget."""

from __future__ import annotations

import pytest
import torch

from fusion.errors import UserError
from fusion.merging.zipping import choose_cut
from fusion.models import CutNetwork, Head, MultiTaskNetwork, cost_of, find_head

SHAPE = (1, 8, 8)
IMAGE = torch.zeros(1, *SHAPE)


def joint(network, cut, tasks: int, *, dense: bool) -> int:
    """Multiply-adds of all tasks' bodies, counted on a network with one trunk."""
    made = CutNetwork(network, cut.layer, dense=dense)
    state = made.state_dict()
    own = {f"t{i}": {k: v for k, v in state.items() if k not in cut.trunk} for i in range(tasks)}
    head = network.linear.weight.numel()
    return cost_of(MultiTaskNetwork.assemble(made, own), SHAPE).multiply_adds - tasks * head


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tasks", [2, 3])
def test_the_counted_multiply_adds_are_those_that_were_chosen(base, tasks, dense) -> None:
    body = cost_of(base, SHAPE).multiply_adds - base.linear.weight.numel()
    shares = []
    for budget in (1.15, 1.3, 1.6, 1.9, tasks + 1.0):
        cut, costs = choose_cut(
            base, find_head(base), IMAGE, tasks=tasks, budget=budget, dense=dense
        )
        assert costs.body == body
        assert costs.share <= budget
        if cut is not None:
            assert joint(base, cut, tasks, dense=dense) == costs.joint
        shares.append(costs.share)
    assert shares == sorted(shares), "a larger budget leaves no fewer layers to the tasks"
    assert shares[0] < shares[-1]


def test_a_budget_for_everything_shares_nothing(base) -> None:
    cut, costs = choose_cut(base, find_head(base), IMAGE, tasks=2, budget=2.0)
    assert cut is not None
    assert cut.layer == "conv1"
    assert cut.trunk == ()
    assert costs.share == 2


def test_a_budget_for_nothing_shares_everything(base) -> None:
    cut, costs = choose_cut(base, find_head(base), IMAGE, tasks=2, budget=1.0)
    assert cut is None
    assert costs.share == 1


def test_a_head_that_is_no_layer_cannot_be_counted(base) -> None:
    with pytest.raises(UserError, match="the head of CifarResNet is no layer"):
        choose_cut(base, Head(("bn1.weight.missing",)), IMAGE, tasks=2, budget=1.5)
