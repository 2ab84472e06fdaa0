from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from fusion.data import ClassSubset, as_rgb, grouped, resized
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.method import BaseAlgorithm, DummyAlgorithm, SNRSelectiveMerge
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.models import CifarResNet, find_layers
from fusion.program import FusionProgram
from fusion.taskpool import BaseTaskPool, ClassificationTaskPool
from fusion.training import FineTuning
from fusion.weights import load_safetensors


class Untouchable(BaseAlgorithm):
    """Fails the test as soon as its work begins."""

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        raise AssertionError("the work began")


CLASSES = {"_pretrained_": list("0123456789"), "a": list("0123"), "b": list("456789")}


@pytest.fixture
def program(pool, tmp_path, test_digits):
    def make(**options: object) -> FusionProgram:
        parts = {
            "method": SNRSelectiveMerge(top_p=0.3, head="pretrained", plot=False),
            "modelpool": BaseModelPool(pool, classes=CLASSES),
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
        {"digits": test_digits, "a": ClassSubset(test_digits, [0, 1, 2, 3])},
        evaluate_members=True,
        fast_dev_run=True,
    )
    outcome = program(taskpool=tasks).run()
    evaluation = outcome.report["evaluation"]
    control = "_pretrained_, batch norm merged"
    assert list(evaluation) == ["_pretrained_", "a", "ensemble", control, "merged"]
    assert list(evaluation["ensemble"]) == [
        "digits"
    ]  # of the other task only one knows the classes
    assert list(evaluation["a"]) == ["a"]  # ten classes are a dash; b answers nothing: no row
    assert evaluation[control] != evaluation["merged"]
    own = outcome.report["shares_of_experts"]
    share = evaluation["merged"]["a"]["accuracy"] / evaluation["a"]["a"]["accuracy"]
    assert own["merged"] == {"a": pytest.approx(share)}
    assert outcome.report["experts"] == {"a": "a"}


def test_an_evaluation_that_fails_loses_no_merge(program, tmp_path) -> None:
    class Failing(BaseTaskPool):
        def evaluate(self, model: nn.Module) -> dict[str, object]:
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        program(taskpool=Failing()).run()
    kept = tmp_path / "run" / "unfinished" / "merged.safetensors"
    assert load_safetensors(kept)
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_task_pool_in_the_manner_of_fusionbench_takes_a_model_alone(program) -> None:
    class Counting(BaseTaskPool):
        def evaluate(self, model: nn.Module) -> dict[str, object]:
            return {"size": {"accuracy": 0.5}}

    assert program(taskpool=Counting()).run().report["evaluation"]["merged"]["size"]

    class Wrong(BaseTaskPool):
        def evaluate(self, model: nn.Module, extra: int) -> dict[str, object]:
            return {}

    with pytest.raises(UserError, match=r"evaluate\(.*extra.*cannot be called with a model alone"):
        program(method=Untouchable(), taskpool=Wrong(), overwrite=True).run()


def test_a_run_leaves_the_algorithm_free_for_another(program, tmp_path) -> None:
    algorithm = SNRSelectiveMerge(top_p=0.3, head="pretrained", plot=False)
    for name in ("one", "two"):
        program(method=algorithm, output_path=tmp_path / name).run()
        assert (tmp_path / name / "layers.csv").is_file()
    assert algorithm.output_path is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("rgb", r"the images of task 'digits' do not fit '_pretrained_': an image of 3×8×8"),
        ("unknown", "task 'digits' asks for the classes even, odd, and no member of the pool"),
    ],
)
def test_a_task_that_does_not_fit_is_found_before_the_work(
    program, test_digits, tmp_path, data, said
) -> None:
    made = {
        "rgb": as_rgb(test_digits),
        "unknown": grouped(test_digits, {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}),
    }[data]
    with pytest.raises(UserError, match=said):
        program(method=Untouchable(), taskpool=ClassificationTaskPool({"digits": made})).run()
    assert list(tmp_path.iterdir()) == []


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


def test_a_check_runs_each_architecture_once_for_each_shape_of_image(
    program, test_digits, monkeypatch
) -> None:
    ran: list[tuple[int, torch.Size]] = []
    real = CifarResNet.forward

    def counted(network: CifarResNet, images: torch.Tensor) -> torch.Tensor:
        if type(images) is torch.Tensor:  # not traced
            ran.append((network.linear.out_features, images.shape))
        return real(network, images)

    monkeypatch.setattr(CifarResNet, "forward", counted)
    spec = {"_target_": "fusion.models.CifarResNet", "depth": 8, "in_channels": 1, "width": 0.5}
    five, ten = ({**spec, "num_classes": outputs} for outputs in (5, 10))
    data = {
        "_pretrained_": test_digits,
        **{name: ClassSubset(test_digits, range(5)) for name in "abc"},
    }
    models = {"_pretrained_": ten, "a": five, "b": five, "c": five}
    members = BaseModelPool(models, train_datasets=data)
    program(method=Untouchable(), modelpool=members, dry_run=True).run()
    assert sorted(ran) == [(5, (1, 1, 8, 8)), (10, (1, 1, 8, 8))]
    enlarged = ClassSubset(resized(test_digits, 9), range(5))
    members = BaseModelPool(models, train_datasets={**data, "b": enlarged, "c": enlarged})
    program(method=Untouchable(), modelpool=members, dry_run=True).run()
    again = [(5, (1, 1, 8, 8)), (5, (1, 1, 9, 9)), (10, (1, 1, 8, 8))]
    assert sorted(ran[2:]) == again


def test_files_with_one_recorded_architecture_and_heads_of_several_sizes_are_told_apart(
    program, test_digits, tmp_path
) -> None:
    spec = {"_target_": "fusion.models.CifarResNet", "depth": 8, "in_channels": 1, "width": 0.5}
    base = BaseModelPool({"_pretrained_": {**spec, "num_classes": 10}})
    groups = {"a": [0, 1, 2], "b": [3, 4, 5, 6, 7]}
    for name, classes in groups.items():
        expert = CifarResNet(8, in_channels=1, width=0.5, num_classes=len(classes))
        base.save_model(expert, tmp_path / f"{name}.safetensors", labels=LabelSpace.of(classes))
    members = BaseModelPool(
        {name: Checkpoint(tmp_path / f"{name}.safetensors") for name in groups},
        train_datasets={name: ClassSubset(test_digits, groups[name]) for name in groups},
    )
    program(method=DummyAlgorithm(), modelpool=members, taskpool=None, dry_run=True).run()


def test_images_that_lack_the_conversion_to_float_are_found_behind_good_ones(
    program, test_digits
) -> None:
    class Bytes(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(1, 8, 8, dtype=torch.uint8), 0

    spec = {"_target_": "fusion.models.CifarResNet", "depth": 8, "in_channels": 1, "width": 0.5}
    members = BaseModelPool(
        {"_pretrained_": spec, "a": spec},
        train_datasets={"_pretrained_": test_digits, "a": Bytes()},
    )
    with pytest.raises(UserError, match="the train data of 'a' do not fit"):
        program(method=Untouchable(), modelpool=members, dry_run=True).run()


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
        "modelpool": BaseModelPool(pool, train_datasets=data, classes=CLASSES),
        "finetune": FineTuning(strategy="selective", epochs=1, images=256, lr=0.01),
    }
    merge = SNRSelectiveMerge(top_p=0.3, head="pretrained", plot=False)
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
    with pytest.raises(UserError, match="fine-tuning needs training images of every expert"):
        program(method=Untouchable(), finetune=FineTuning()).run()
