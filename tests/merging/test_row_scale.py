"""Bringing experts to the base's scale changes no function; row norms are then the base's."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.testing import assert_close

from fusion.merging.members import Members
from fusion.merging.row_scale import with_rows_of_base
from fusion.modelpool import BaseModelPool
from fusion.weights import load_tensors, tensors_of


def test_an_expert_computes_what_it_did_at_the_row_norms_of_the_base(base, experts) -> None:
    members = Members.read(BaseModelPool({"_pretrained_": base, **experts}))
    scaled = with_rows_of_base(members)
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, expert in experts.items():
        brought = copy.deepcopy(expert)
        load_tensors(brought, scaled.experts[name])
        with torch.no_grad():
            assert_close(brought.eval()(images), expert.eval()(images), rtol=1e-4, atol=1e-4)
        convolutions = [m for m, module in base.named_modules() if isinstance(module, nn.Conv2d)]
        for module in convolutions:
            own, wanted = (
                network.get_parameter(f"{module}.weight").flatten(1).norm(dim=1)
                for network in (brought, base)
            )
            assert_close(own, wanted)
            assert not torch.equal(
                brought.get_parameter(f"{module}.weight"), expert.get_parameter(f"{module}.weight")
            )


def test_the_head_and_the_members_stay_as_they_are(base, experts) -> None:
    before = {name: dict(tensors_of(copy.deepcopy(e))) for name, e in experts.items()}
    scaled = with_rows_of_base(Members.read(BaseModelPool({"_pretrained_": base, **experts})))
    for name, expert in experts.items():
        assert torch.equal(scaled.experts[name]["linear.weight"], expert.linear.weight)
        assert all(torch.equal(before[name][k], t) for k, t in tensors_of(expert).items())


def test_a_row_of_zeros_stays(base, experts) -> None:
    dead = copy.deepcopy(experts["a"])
    with torch.no_grad():
        dead.conv1.weight[2] = 0
    scaled = with_rows_of_base(Members.read(BaseModelPool({"_pretrained_": base, "a": dead})))
    assert not scaled.experts["a"]["conv1.weight"][2].any()
    assert scaled.experts["a"]["bn1.running_var"].isfinite().all()
