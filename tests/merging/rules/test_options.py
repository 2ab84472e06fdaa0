"""What a user may ask of a rule, and what the examples show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import fusion.merging.rules
from fusion.errors import UserError
from fusion.merging.rule import merge_tensor
from fusion.merging.rules import (
    PCB,
    TSVM,
    WUDI,
    ConsensusTA,
    Dare,
    Fisher,
    IsoC,
    IsoCTS,
    LiNeS,
    MagMax,
    RegMean,
    TaskArithmetic,
    Ties,
)

REFUSED = [
    (TaskArithmetic, {"scale": float("nan")}),
    (TaskArithmetic, {"scale": "0.3"}),
    (TaskArithmetic, {"scale": True}),
    (Ties, {"density": 0}),
    (Ties, {"density": 1.1}),
    (Ties, {"scope": "layer"}),
    (Ties, {"scale": float("inf")}),
    (Dare, {"density": 0.0}),
    (MagMax, {"scale": None}),
    (PCB, {"density": -0.1}),
    (PCB, {"scale": float("inf")}),
    (ConsensusTA, {"mask_threshold": -1}),
    (ConsensusTA, {"minimum_tasks": -1}),
    (ConsensusTA, {"scale": float("nan")}),
    (LiNeS, {"alpha": -0.1}),
    (LiNeS, {"beta": float("nan")}),
    (TSVM, {"scale": float("nan")}),
    (IsoC, {"scale": float("nan")}),
    (IsoCTS, {"common_share": 1.2}),
    (IsoCTS, {"scale": float("nan")}),
    (WUDI, {"ridge": 0}),
    (WUDI, {"iterations": 0}),
    (WUDI, {"learning_rate": 0}),
    (Fisher, {"floor": 0}),
    (RegMean, {"off_diagonal": 1.5}),
    (RegMean, {"ridge": 0}),
]


@pytest.mark.parametrize(("rule", "options"), REFUSED, ids=str)
def test_an_option_outside_of_its_range_is_refused(rule, options) -> None:
    (option,) = options
    with pytest.raises(UserError, match=rf"{rule.__name__}\.{option} is .*; give "):
        rule(**options)


def test_fewer_experts_than_a_consensus_takes_are_refused() -> None:
    with pytest.raises(UserError, match="minimum_tasks"):
        merge_tensor(ConsensusTA(), [torch.ones(3)], torch.zeros(3))


MODULES = ["fusion.merging.rule", "fusion.weights.random_mask"] + [
    f"fusion.merging.rules.{module.name}"
    for module in pkgutil.iter_modules(fusion.merging.rules.__path__)
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0
    assert result.attempted > 0 or module.endswith(".options")
