"""Networks with several heads: each task with its own, and all of them together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusion.data import ClassSubset, ImageTensors, batches, grouped, inverted, label_space
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.models import MultiTaskNetwork, find_head
from fusion.taskpool import JOINT, ClassificationTaskPool, Contestant, Ensemble

CLASSES = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7, 8, 9)}


@pytest.fixture(scope="module")
def images(test_digits) -> ImageTensors:
    return test_digits


@pytest.fixture
def model(base, experts) -> MultiTaskNetwork:
    head = find_head(base).tensors
    own = {name: {k: e.state_dict()[k] for k in head} for name, e in experts.items()}
    labels = {name: LabelSpace(own, tuple(map(str, own))) for name, own in CLASSES.items()}
    return MultiTaskNetwork.assemble(base, own, labels).eval()


def logits(model: nn.Module, data: ImageTensors) -> tuple[torch.Tensor, torch.Tensor]:
    ((pictures, labels),) = batches(data, batch_size=len(data))
    with torch.no_grad():
        return model(pictures), labels


def test_each_task_is_measured_with_its_own_head(model, images) -> None:
    tasks = {name: ClassSubset(images, own) for name, own in CLASSES.items()}
    found = ClassificationTaskPool(tasks, joint=None).evaluate(model)
    assert list(found) == ["a", "b"]
    for name, data in tasks.items():
        scores, labels = logits(model.for_task(name), data)
        right = (scores.argmax(1) == labels).double().mean()
        assert found[name]["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("rule", ["raw", "softmax"])
def test_the_joint_problem_is_over_the_classes_of_all_heads(model, images, rule) -> None:
    tasks = {name: ClassSubset(images, own) for name, own in CLASSES.items()}
    found = ClassificationTaskPool(tasks, joint=rule).evaluate(model)[JOINT]
    right = 0
    for offset, data in ((0, tasks["a"]), (4, tasks["b"])):
        both = []
        for name in CLASSES:
            scores, labels = logits(model.for_task(name), data)
            both.append(scores.softmax(1) if rule == "softmax" else scores)
        right += int((torch.cat(both, 1).argmax(1) == labels + offset).sum())
    assert found["images"] == len(images)
    assert found["accuracy"] == pytest.approx(right / len(images))
    assert list(found["class_accuracy"]) == [str(n) for own in CLASSES.values() for n in own]


def test_a_plain_network_answers_the_joint_problem_over_all_its_outputs(base, images) -> None:
    tasks = {name: ClassSubset(images, own) for name, own in CLASSES.items()}
    labels = label_space(images)
    found = ClassificationTaskPool(tasks).evaluate(base, labels=labels)
    scores, truth = logits(base, images)
    right = (scores.argmax(1) == truth).double().mean()
    assert found[JOINT]["accuracy"] == pytest.approx(float(right))


def test_a_task_of_all_classes_is_answered_by_all_heads_together(model, images) -> None:
    found = ClassificationTaskPool({"all": images}).evaluate(model)
    split = {name: ClassSubset(images, own) for name, own in CLASSES.items()}
    joint = ClassificationTaskPool(split).evaluate(model)[JOINT]
    assert found["all"]["accuracy"] == pytest.approx(joint["accuracy"])


def test_tasks_that_share_classes_have_no_joint_problem(base, images) -> None:
    labels = label_space(images)
    tasks = ClassificationTaskPool({"clean": images, "negative": inverted(images)})
    assert list(tasks.evaluate(base, labels=labels)) == ["clean", "negative"]


def test_a_head_that_does_not_know_a_tasks_classes_does_not_answer_it(model, images) -> None:
    parity = grouped(images, {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]})
    found = ClassificationTaskPool({"a": parity, "b": ClassSubset(images, CLASSES["b"])})
    assert list(found.evaluate(model)) == ["b"]  # the name alone does not make it an answer


def test_an_ensemble_is_the_mean_of_those_who_know(base, net, images) -> None:
    other = net(seed=4)
    labels = label_space(images)
    both = Ensemble(
        {"x": base, "y": other}, {"x": labels, "y": labels}, {"x": "x", "y": "y"}
    ).eval()
    found = ClassificationTaskPool({"all": images}).evaluate(both)["all"]
    mean = sum(logits(n, images)[0].softmax(1) for n in (base, other)) / 2
    right = (mean.argmax(1) == images.labels).double().mean()
    assert found["accuracy"] == pytest.approx(float(right), abs=2 / len(images))
    assert found["loss"] == pytest.approx(
        float(nn.functional.nll_loss(mean.log(), images.labels)), rel=1e-4
    )


def test_all_networks_are_measured_in_one_pass_over_the_images(base, net, images) -> None:
    """Photographs are decoded once for all of them."""

    class Counted(torch.utils.data.Dataset):
        class_names = images.class_names
        original_labels = images.original_labels
        labels = images.labels[:40]
        reads = 0

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            type(self).reads += 1
            return images[index]

    data = Counted()
    labels = label_space(images)
    made = {name: net(seed=seed) for seed, name in enumerate("xyz")}
    tasks = ClassificationTaskPool({"all": data})
    together = tasks.evaluate_all(
        {name: Contestant(lambda m=m: m, labels) for name, m in made.items()}
    )
    assert Counted.reads <= 40 + 1  # and one to see what it gives
    alone = {name: tasks.evaluate(copy.deepcopy(m), labels=labels) for name, m in made.items()}
    assert together == alone


def test_only_some_tasks_are_measured(model, images) -> None:
    tasks = {name: ClassSubset(images, own) for name, own in CLASSES.items()}
    alone = ClassificationTaskPool(tasks, only=["b"]).evaluate(model)
    both = ClassificationTaskPool(tasks, joint=None).evaluate(model)
    assert alone == {"b": both["b"]}
    with pytest.raises(UserError, match=r"only=c: .*there are a, b"):
        ClassificationTaskPool(tasks, only=["a", "c"])
