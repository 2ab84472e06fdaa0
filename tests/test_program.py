from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.method import BaseAlgorithm, DummyAlgorithm, SNRSelectiveMerge
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.program import FusionProgram
from fusion.taskpool import ClassificationTaskPool


class Untouchable(BaseAlgorithm):
    """Fails the test as soon as its work begins."""

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        raise AssertionError("the work began")


@pytest.fixture
def program(pool, tmp_path, test_digits):
    def make(**options: object) -> FusionProgram:
        parts = {
            "method": SNRSelectiveMerge(top_p=0.3, plot=False),
            "modelpool": BaseModelPool(pool),
            "taskpool": ClassificationTaskPool({"digits": test_digits}, fast_dev_run=True),
            "output_path": tmp_path / "run",
        }
        return FusionProgram(**{**parts, **options})

    return make


def test_plain_objects_run_from_plain_python(program, tmp_path, equal) -> None:
    outcome = program().run()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == "SNRSelectiveMerge"
    assert report["evaluation"]["merged"] == outcome.report["evaluation"]["merged"]
    assert "_pretrained_, batch norm merged" in report["evaluation"]
    assert (tmp_path / "run" / "layers.csv").is_file()
    spec = {
        "_target_": "fusion.models.CifarResNet",
        "depth": 8,
        "in_channels": 1,
        "width": 0.5,
    }
    assert equal(Checkpoint(tmp_path / "run" / "merged.safetensors", spec).build(), outcome.model)


def test_the_global_generator_is_seeded_for_the_run(program) -> None:
    drawn = []

    class Draws(DummyAlgorithm):
        def run(self, modelpool: BaseModelPool) -> nn.Module:
            drawn.append(torch.rand(3).tolist())
            return super().run(modelpool)

    for seed in (1, 1, 2):
        program(method=Draws(), taskpool=None, seed=seed, overwrite=True).run()
    assert drawn[0] == drawn[1] != drawn[2]


def test_members_are_measured_when_asked(program, pool, test_digits) -> None:
    tasks = ClassificationTaskPool(
        {"digits": test_digits}, evaluate_members=True, fast_dev_run=True
    )
    with pytest.raises(UserError, match="answers none of the tasks digits"):
        program(taskpool=tasks).run()  # the experts know no ten classes
    only = BaseModelPool({"_pretrained_": pool["_pretrained_"]})
    outcome = program(method=DummyAlgorithm(), modelpool=only, taskpool=tasks).run()
    evaluation = outcome.report["evaluation"]
    assert list(evaluation) == ["_pretrained_", "merged"]
    assert evaluation["_pretrained_"] == evaluation["merged"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("output_path", "output_path: cannot write to the folder"),
        ("modelpool", "expert 'odd'"),
        ("taskpool", "did you mean 'split'"),
        ("fabric", "Lightning Fabric refuses"),
    ],
)
def test_what_is_wrong_is_found_before_the_work(program, pool, tmp_path, wrong, said) -> None:
    value = {
        "output_path": Path("/proc/nowhere"),
        "modelpool": BaseModelPool({**pool, "odd": nn.Conv2d(1, 1, 3)}),
        "taskpool": ClassificationTaskPool({"d": {"_target_": "fusion.data.digits", "splt": 1}}),
        "fabric": {"accelerator": "gpu", "devices": 77},
    }[wrong]
    with pytest.raises(UserError, match=said):
        program(method=Untouchable(), **{wrong: value}).run()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_checks_and_leaves_nothing(program, tmp_path) -> None:
    assert program(method=Untouchable(), dry_run=True).run() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["method", "modelpool", "taskpool"])
def test_a_part_of_another_kind_is_told(program, part) -> None:
    with pytest.raises(UserError, match=f"{part} must be a Base.*, not a Counter"):
        program(**{part: {"_target_": "collections.Counter"}}).run()
