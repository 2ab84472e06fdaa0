from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils.data import TensorDataset

import fusion
from fusion.data import ClassSubset, ImageTensors, batches, quarter_turns
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.taskpool import BaseTaskPool, ClassificationTaskPool, Contestant


@pytest.fixture(scope="module")
def images(test_digits) -> ImageTensors:
    return test_digits


def scores_of(model: nn.Module, data: ImageTensors) -> tuple[np.ndarray, np.ndarray]:
    ((pictures, labels),) = batches(data, batch_size=len(data))
    with torch.no_grad():
        return model(pictures).double().numpy(), labels.numpy()


def test_the_two_import_paths_are_one_class() -> None:
    assert fusion.BaseTaskPool is BaseTaskPool


@pytest.mark.parametrize("batch_size", [7, 500, 1000])
def test_the_metrics_are_those_of_a_computation_by_hand(base, images, batch_size) -> None:
    tasks = ClassificationTaskPool({"all": images}, batch_size=batch_size)
    found = tasks.evaluate(base)["all"]
    scores, labels = scores_of(base, images)
    answers = scores.argmax(1)
    assert found["images"] == len(images) == 531
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert found["f1"] == pytest.approx(
        f1_score(labels, answers, average="weighted", zero_division=0), abs=1e-6
    )
    log_shares = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    assert found["loss"] == pytest.approx(-log_shares[range(len(labels)), labels].mean(), rel=1e-5)
    for label in range(10):
        own = labels == label
        assert found["class_accuracy"][str(label)] == pytest.approx(
            (answers[own] == label).mean(), abs=1e-6
        )


def test_an_expert_is_measured_on_its_own_classes_by_their_original_labels(net, images) -> None:
    expert = net(3, seed=2)
    own = ClassSubset(images, [7, 2, 5])
    tasks = ClassificationTaskPool({"all": images, "own": own, "two": ClassSubset(images, [5, 7])})
    found = tasks.evaluate(expert, labels=LabelSpace.of([7, 2, 5]))
    assert list(found) == ["own", "two"]  # the ten classes it cannot answer are left out
    scores, labels = scores_of(expert, own)
    assert found["own"]["accuracy"] == pytest.approx((scores.argmax(1) == labels).mean())
    assert list(found["own"]["class_accuracy"]) == ["7", "2", "5"]
    turned = tasks.evaluate(
        expert, labels=LabelSpace.of([2, 7, 5])
    )  # the same network, other labels
    assert turned["own"]["accuracy"] != found["own"]["accuracy"]


def test_a_model_of_more_classes_answers_over_all_its_outputs(base, images) -> None:
    own = ClassSubset(images, [4, 9])
    labels = LabelSpace.of(list(range(10)))
    found = ClassificationTaskPool({"own": own}).evaluate(base, labels=labels)["own"]
    scores, labels = scores_of(base, own)
    right = scores.argmax(1) == np.array([4, 9])[labels]
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["class_accuracy"] == {
        name: pytest.approx(right[labels == own_label].mean(), abs=1e-6)
        for own_label, name in enumerate(["4", "9"])
    }


def test_the_model_is_left_as_it_was(base, net, images, equal) -> None:
    base.train()
    base.layer2.eval()
    ClassificationTaskPool({"all": images}).evaluate(base)
    assert base.training
    assert base.bn1.training
    assert not base.layer2[0].bn1.training
    assert equal(base, net())
    assert next(base.parameters()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_measured(base, images, dtype) -> None:
    pool = ClassificationTaskPool({"digits": images})
    wide = pool.evaluate(base)["digits"]["loss"]
    assert pool.evaluate(copy.deepcopy(base).to(dtype))["digits"]["loss"] == pytest.approx(
        wide, rel=0.02
    )


def test_a_model_of_several_precisions_takes_images_as_they_are(base, images) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.net = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) / self.temperature

    pool = ClassificationTaskPool({"digits": images})
    assert pool.evaluate(Scaled()) == pool.evaluate(base)


def test_the_mode_is_given_back_when_evaluation_fails(images) -> None:
    class Sick(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("sick")

    model = Sick()
    with pytest.raises(RuntimeError, match="sick"):
        ClassificationTaskPool({"all": images}).evaluate(model)
    assert model.training


def test_datasets_of_others_are_taken(base, net) -> None:
    data = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
    found = ClassificationTaskPool({"plain": data}, batch_size=6).evaluate(base)["plain"]
    assert found["images"] == 20
    assert list(found["class_accuracy"]) == [str(label) for label in range(10)]
    with pytest.raises(UserError, match="answers none of the tasks"):  # though the first would fit
        ClassificationTaskPool({"plain": data}, batch_size=4).evaluate(net(4))


def test_classes_that_nobody_knows_are_assumed_aloud(base, images, caplog) -> None:
    tasks = ClassificationTaskPool({"all": images, "own": ClassSubset(images, [4, 9])})
    with caplog.at_level(logging.WARNING, "fusion"):
        found = tasks.evaluate(base)
    assert list(found) == ["all"]  # never by position: ten outputs are not the classes 4 and 9
    assert "The classes of 'model' are unknown" in caplog.text


def test_unknown_classes_answer_no_task_where_the_tasks_differ(base, net, images, caplog) -> None:
    """Ten outputs may be the ten digits, or nothing of the kind: the other task says it is open."""
    tasks = ClassificationTaskPool({"digit": images, "turn": quarter_turns(images)})
    known = LabelSpace.of(images.class_names)
    with caplog.at_level(logging.WARNING, "fusion"):
        found = tasks.evaluate_all(
            {"open": Contestant(lambda: base), "known": Contestant(lambda: base, known)}
        )
    assert found["open"] == {}
    assert list(found["known"]) == ["digit"]
    assert "classes of 'open' are unknown, and the tasks ask for different ones" in caplog.text
    with pytest.raises(UserError, match="the classes of its outputs are unknown"):
        tasks.evaluate(base)


def test_one_batch_is_enough_for_a_trial(base, images) -> None:
    tasks = ClassificationTaskPool({"all": images}, batch_size=50, fast_dev_run=True)
    assert tasks.evaluate(base)["all"]["images"] == 50


def test_data_are_built_when_needed_and_once() -> None:
    tasks = ClassificationTaskPool({"d": {"_target_": "fusion.data.digits", "split": "test"}})
    assert tasks.task_names == ["d"]
    assert tasks.load_dataset("d") is tasks.load_dataset("d")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": {}}, "tasks is {}; give a non-empty mapping"),
        ({"tasks": {"d": 1}}, "tasks.d is 1; give a Dataset, or a mapping with _target_"),
        ({"tasks": {"d": {"_target_": "x"}}, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_an_option_without_meaning_is_refused_at_once(options, said) -> None:
    with pytest.raises(UserError, match=said):
        ClassificationTaskPool(**options)


def test_a_misspelt_option_of_a_task_is_found_by_the_check() -> None:
    tasks = ClassificationTaskPool({"d": {"_target_": "fusion.data.digits", "splt": "test"}})
    with pytest.raises(UserError, match="did you mean 'split'"):
        tasks.check()


def test_what_cannot_be_measured_is_told(base, net, images) -> None:
    tasks = ClassificationTaskPool({"all": images})
    with pytest.raises(UserError, match="answers none of the tasks all"):
        tasks.evaluate(net(4))
    with pytest.raises(UserError, match=r"answers none of the tasks all.*which stand for 1, 2"):
        tasks.evaluate(base, labels=LabelSpace.of([1, 2]))
    with pytest.raises(UserError, match="needs one row of class scores per image"):
        tasks.evaluate(nn.Identity())
    empty = TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UserError, match="the TensorDataset is empty"):
        ClassificationTaskPool({"none": empty}).evaluate(base)


def _measure(fabric, model: nn.Module, images: ImageTensors, path: str) -> None:
    tasks = ClassificationTaskPool({"all": images}, batch_size=50)
    tasks.fabric = fabric
    found = tasks.evaluate(model)["all"]
    if fabric.global_rank == 1:  # the one that is not rank zero
        torch.save(found, path)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(base, images, tmp_path) -> None:
    from lightning.fabric import Fabric

    one = ClassificationTaskPool({"all": images}, batch_size=50).evaluate(base)["all"]
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    path = str(tmp_path / "found.pt")
    fabric.launch(_measure, copy.deepcopy(base), images, path)
    two = torch.load(path)
    assert two["images"] == one["images"] == 531
    assert two["class_accuracy"] == pytest.approx(one["class_accuracy"])
    for metric in ("accuracy", "f1", "loss"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-5)
