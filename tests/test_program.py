from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fusion.errors import UserError
from fusion.method import BaseAlgorithm, DummyAlgorithm, SNRSelectiveMerge
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.models import find_layers
from fusion.program import FusionProgram
from fusion.taskpool import ClassificationTaskPool
from fusion.training import FineTuning
from fusion.weights import load_safetensors


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


def test_the_result_is_fine_tuned_in_the_layers_that_were_merged(
    program, pool, tmp_path, train_digits
) -> None:
    data = {"_pretrained_": train_digits}
    options = {
        "modelpool": BaseModelPool(pool, train_datasets=data),
        "finetune": FineTuning(strategy="selective", epochs=1, images=256, lr=0.01),
    }
    merge = SNRSelectiveMerge(top_p=0.3, plot=False)
    outcome = program(method=merge, **options).run()
    report = outcome.report["finetune"]
    layers = {layer.name: layer for layer in find_layers(outcome.model)}
    head = list(layers)[-1]
    assert report["trained_layers"] == [n for n in layers if n in (*merge.selected_layers, head)]
    assert set(outcome.report["evaluation"]) >= {"merged", "finetuned"}
    tuned = load_safetensors(tmp_path / "run" / "finetuned.safetensors")
    before = load_safetensors(tmp_path / "run" / "merged.safetensors")
    changed = {key for key in tuned if not torch.equal(tuned[key], before[key])}
    trained = {key for name in report["trained_layers"] for key in layers[name].tensors}
    assert changed
    assert changed <= trained


def test_fine_tuning_needs_images(program) -> None:
    with pytest.raises(UserError, match="the pool has no train_datasets"):
        program(method=Untouchable(), finetune=FineTuning()).run()
