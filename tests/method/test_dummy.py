from __future__ import annotations

import pytest
from torch import nn

from fusion.errors import UserError
from fusion.method import DummyAlgorithm


def test_it_returns_the_base_or_the_first_model(base, net, equal) -> None:
    other = net(4, seed=3)
    assert equal(DummyAlgorithm().run({"x": other, "_pretrained_": base}), base)
    assert equal(DummyAlgorithm().run({"x": other, "y": base}), other)
    assert equal(DummyAlgorithm().run([other, base]), other)


def test_a_module_passes_through(base, equal) -> None:
    assert equal(DummyAlgorithm().run(base), base)


def test_the_members_need_not_be_mergeable(base, equal) -> None:
    assert equal(DummyAlgorithm().run({"_pretrained_": base, "x": nn.Linear(1, 1)}), base)


def test_an_empty_pool_is_an_error() -> None:
    with pytest.raises(UserError, match="the pool is empty"):
        DummyAlgorithm().run({})


def test_the_model_that_is_handed_back_is_checked_before_the_run(tmp_path) -> None:
    lost = {"_target_": "fusion.modelpool.Checkpoint", "path": str(tmp_path / "gone.pt")}
    with pytest.raises(UserError, match=r"model '_pretrained_': checkpoint .* no such file"):
        DummyAlgorithm().run({"_pretrained_": lost})
