from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

import fusion
from fusion.errors import UserError
from fusion.method import BaseAlgorithm
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet


class Telling(BaseAlgorithm):
    """Returns the first model and tells in which order it was called."""

    def __init__(self, *, fails: bool = False) -> None:
        self.told: list[str] = []
        self.fails = fails

    def on_run_start(self) -> None:
        self.told.append("start")

    def on_run_end(self) -> None:
        self.told.append("end")

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        self.told.append("run")
        assert isinstance(modelpool, BaseModelPool)
        if self.fails:
            raise RuntimeError("broken")
        with self.profile("load"):
            return modelpool.load_pretrained_or_first_model()


class Further(Telling):
    """A subclass of a subclass that goes through its parent's run."""

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        self.told.append("further")
        return super().run(modelpool)


class Inheriting(Telling):
    """A subclass that keeps its parent's run."""


def test_the_two_import_paths_are_one_class() -> None:
    assert fusion.BaseAlgorithm is BaseAlgorithm


def test_run_must_be_written() -> None:
    class Lazy(BaseAlgorithm):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Lazy()


def test_hooks_stand_around_the_run(base) -> None:
    algorithm = Telling()
    algorithm.run([base])
    assert algorithm.told == ["start", "run", "end"]
    assert Inheriting().run([base]) is not base


def test_the_last_hook_is_called_when_the_run_fails(base) -> None:
    algorithm = Telling(fails=True)
    with pytest.raises(RuntimeError, match="broken"):
        algorithm.run([base])
    assert algorithm.told == ["start", "run", "end"]
    algorithm.fails = False
    algorithm.run([base])  # and the next run is a whole one
    assert algorithm.told == ["start", "run", "end"] * 2


def test_a_subclass_of_a_subclass_runs_its_hooks_once(base) -> None:
    algorithm = Further()
    algorithm.run([base])
    assert algorithm.told == ["start", "further", "run", "end"]
    assert algorithm.timings["run"].calls == 1


@pytest.mark.parametrize("kind", ["pool", "dict", "list", "tuple", "module"])
def test_run_takes_whatever_holds_networks(base, equal, kind) -> None:
    given = {
        "pool": BaseModelPool({"_pretrained_": base}),
        "dict": {"_pretrained_": base},
        "list": [base],
        "tuple": (base,),
        "module": base,
    }[kind]
    result = Telling().run(given)
    assert equal(result, base)
    assert result is not base


def test_the_pool_is_checked_before_the_run(base) -> None:
    algorithm = Telling()
    with pytest.raises(UserError, match="expert 'odd'"):
        algorithm.run({"_pretrained_": base, "odd": CifarResNet(14, 10, in_channels=1)})
    assert algorithm.told == []


def test_profile_counts_and_adds_up_also_when_the_block_fails(base) -> None:
    algorithm = Telling()
    algorithm.run([base])
    assert algorithm.timings["load"].calls == algorithm.timings["run"].calls == 1
    assert 0 < algorithm.timings["load"].seconds <= algorithm.timings["run"].seconds
    with pytest.raises(KeyError), algorithm.profile("fails"):
        raise KeyError
    assert algorithm.timings["fails"].calls == 1


def test_the_time_is_told(base, caplog) -> None:
    with caplog.at_level(logging.INFO, "fusion"):
        Telling().run([base])
    assert re.search(r"Time: .*load \d+\.\d s", caplog.text)


def test_fabric_works_with_no_set_up_and_can_be_set() -> None:
    from lightning.fabric import Fabric

    algorithm = Telling()
    assert algorithm._fabric is None
    assert isinstance(algorithm.fabric, Fabric)
    assert algorithm.fabric is algorithm.fabric
    cpu = Fabric(accelerator="cpu")
    algorithm.fabric = cpu
    assert algorithm.fabric is cpu
    assert algorithm.fabric.device == torch.device("cpu")


def test_report_controls_and_timings_belong_to_one_run(base) -> None:
    class Noting(Telling):
        def run(self, modelpool: BaseModelPool) -> nn.Module:
            self.report[f"run {len(self.told)}"] = True
            self.controls[f"control {len(self.told)}"] = lambda: base
            return super().run(modelpool)

    algorithm = Noting()
    algorithm.run([base])
    first = algorithm.record
    algorithm.run([base])
    assert list(first.report) == ["run 1"]
    assert list(algorithm.report) == ["run 4"]
    assert list(algorithm.controls) == ["control 4"]
    assert algorithm.timings["load"].calls == 1


class GivesARun:
    """A mixin that brings ``run``, and knows no algorithm."""

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        assert isinstance(modelpool, BaseModelPool)
        return modelpool.load_pretrained_or_first_model()


def test_a_run_from_a_mixin_or_assigned_later_receives_a_pool(base, equal) -> None:
    class Mixed(GivesARun, BaseAlgorithm):
        pass

    class Assigned(Telling):
        pass

    Assigned.run = GivesARun.run
    own = Telling()
    own.run = GivesARun().run
    for algorithm in (Mixed(), Assigned(), own):
        assert equal(algorithm.run({"_pretrained_": base}), base)
        assert algorithm.timings["run"].calls == 1


def test_two_algorithms_share_no_report(base) -> None:
    one, other = Telling(), Telling()
    one.report["x"] = 1
    one.controls["y"] = lambda: base
    one.run([base])
    assert other.report == {}
    assert other.controls == {}
    assert other.timings == {}
    assert other.output_path is None
    assert other.progress is None
