from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet


def told(pool: BaseModelPool) -> str:
    with pytest.raises(UserError) as caught:
        pool.preflight()
    return str(caught.value)


def changed(model: nn.Module, **tensors: torch.Tensor) -> nn.Module:
    """A copy of the model with some tensors replaced, named with double underscores for dots."""
    other = copy.deepcopy(model)
    for name, tensor in tensors.items():
        owner, _, key = name.replace("__", ".").rpartition(".")
        module = other.get_submodule(owner)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[key] = tensor
    return other


def first(model: nn.Module, ending: str) -> str:
    return next(key for key in model.state_dict() if key.endswith(ending))


def test_heads_of_other_shapes_pass(pool) -> None:
    BaseModelPool(pool).preflight()


def test_everything_wrong_is_told_in_one_error(base, tmp_path) -> None:
    weight = first(base, "weight")
    mean = first(base, "running_mean")
    dots = {name: name.replace(".", "__") for name in (weight, mean)}
    state = base.state_dict()
    message = told(
        BaseModelPool(
            {
                "_pretrained_": base,
                "wide": changed(base, **{dots[weight]: torch.zeros(5, 1, 3, 3)}),
                "deep": CifarResNet(14, 10, in_channels=1, width=0.5),
                "sick": changed(base, **{dots[mean]: torch.full_like(state[mean], torch.nan)}),
                "lost": {
                    "_target_": "fusion.modelpool.Checkpoint",
                    "path": str(tmp_path / "no.pt"),
                },
                "fine": copy.deepcopy(base),
            }
        )
    )
    assert (
        f"expert 'wide': {weight} is (5, 1, 3, 3), the pretrained model has (8, 1, 3, 3)" in message
    )
    assert "expert 'deep': has " in message
    deep = CifarResNet(14, 10, in_channels=1, width=0.5).state_dict()
    more = len(deep.keys() - state.keys()) - 3
    assert f"and {more} more, unknown to the pretrained model" in message
    assert "a pool's members must share one architecture up to the head" in message
    assert f"model 'sick': {mean} has 8 of 8 entries that are NaN or infinite" in message
    assert "model 'lost': checkpoint" in message
    assert "'fine'" not in message


def test_float_widths_may_differ_and_kinds_may_not(base) -> None:
    BaseModelPool({"_pretrained_": base, "half": copy.deepcopy(base).bfloat16()}).preflight()
    weight = first(base, "weight")
    whole = changed(base, **{weight.replace(".", "__"): torch.zeros(8, 1, 3, 3).int()})
    message = told(BaseModelPool({"_pretrained_": base, "whole": whole}))
    assert (
        f"expert 'whole': {weight} is torch.int32, the pretrained model has torch.float32"
        in message
    )


def test_without_a_base_the_first_model_is_the_measure(base) -> None:
    message = told(BaseModelPool({"x": base, "y": CifarResNet(14, 10, in_channels=1, width=0.5)}))
    assert "expert 'y'" in message
    assert "unknown to 'x'" in message


def test_a_network_that_is_built_sick_is_told_when_it_is_loaded(base) -> None:
    weight = first(base, "weight")
    sick = changed(base, **{weight.replace(".", "__"): torch.full((8, 1, 3, 3), torch.inf)})
    with pytest.raises(UserError, match=f"model 'x': {weight} has 72 of 72"):
        BaseModelPool({"x": lambda: sick}).load_model("x")


def test_the_answer_is_remembered_until_a_model_is_added(base) -> None:
    pool = BaseModelPool({"_pretrained_": base})
    pool.preflight()
    pool.add_model("odd", nn.Conv2d(1, 1, 3))
    assert "expert 'odd'" in told(pool)


def test_an_empty_pool_is_told() -> None:
    assert "the pool is empty" in told(BaseModelPool({}))
