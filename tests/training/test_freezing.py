from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.training import freeze

Make = Callable[..., nn.Module]


def test_frozen_norms_stay_in_evaluation_and_all_is_undone(make_model: Make) -> None:
    model = make_model()
    model.body.bn1.bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with freeze(model, ["body.conv1.weight", "body.bn1.running_mean", "head"]) as frozen:
        frozen.train()
        assert frozen.trained == ("body.conv1.weight", "head.weight", "head.bias")
        assert [n for n, p in model.named_parameters() if p.requires_grad] == list(frozen.trained)
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert {name for name, norm in norms.items() if norm.training} == {"body.bn1"}
        assert model.dropout.training
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_a_module_stands_for_what_is_inside_and_for_nothing_beside(make_model: Make) -> None:
    model = make_model()
    with freeze(model, ["body.layer1"]) as frozen:
        inside = [name for name, _ in model.named_parameters() if name.startswith("body.layer1.")]
        assert list(frozen.trained) == inside


def test_either_name_of_a_tied_parameter_trains_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with freeze(model, ["1"]) as frozen:
        assert model[0].weight.requires_grad
        assert frozen.trained == ("0.weight",)


def test_requires_grad_is_given_back_when_the_block_fails(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(RuntimeError), freeze(model, ["head"]):
        raise RuntimeError
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["body.cnv1"], "did you mean 'body.conv1'"),
        ([], "names no parameter"),
        (["dropout"], "names no parameter"),
        (["body.bn1.running_var"], "names no parameter"),
    ],
)
def test_names_that_train_nothing_are_refused(
    make_model: Make, names: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message), freeze(make_model(), names):
        pass


def test_a_frozen_norm_without_parameters_is_frozen_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten())
    with freeze(model, ["0"]) as frozen:
        frozen.train()
        before = model[1].running_mean.clone()
        model(torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(model[1].running_mean, before)
