"""Accuracy, weighted F1, loss and per-class accuracy of classifiers on named tasks."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fusion.data import Preprocessing, batches, label_space, labels_of
from fusion.data.shared import load_dataset
from fusion.errors import UserError, check_choice
from fusion.labels import LabelSpace, joint_space
from fusion.models import MultiTaskNetwork
from fusion.options import NON_EMPTY, Count, Names, TargetMapping, checked
from fusion.target import is_target
from fusion.taskpool.answers import Call, Ensemble, JointRule, answer_of
from fusion.taskpool.base import BaseTaskPool, Contestant
from fusion.taskpool.examinee import Examinee
from fusion.weights import image_dtype

log = logging.getLogger(__name__)

JOINT = "joint"  # the task of telling apart the classes of all tasks
# Networks that are measured in one pass over the images, at most: photographs are decoded once for
# all of them, and no more than this is in memory in addition to the images.
_TOGETHER_BYTES = 2**31


class ClassificationTaskPool(BaseTaskPool):
    """Measure classifiers on each of several data sets.

    A task's labels and a model's outputs are matched by their classes. A model of ten classes is
    measured on a task of four of them over all its ten outputs (an answer among the other six is
    wrong). A model of four classes is measured only on tasks without any other class, and a model
    of several heads with the head of the task. Tasks that a model cannot answer are omitted from
    its result.

    Where no two tasks have a class in common, the joint problem is measured too: to classify each
    image among the classes of all tasks and heads.

    Args:
        tasks: name → dataset, or a mapping with ``_target_`` that builds one when it is needed.
            Its classes are read from ``class_names`` and ``original_labels``, or from
            torchvision's ``classes``.
        batch_size: images per forward pass.
        evaluate_members: whether a program also evaluates the pool's members.
        joint: how the scores of several heads are compared in the joint problem: ``softmax``
            (probabilities within each head's own classes), ``raw`` (logits as they are), or
            ``None`` (not measured).
        fast_dev_run: measure on one batch only.
        only: names of the tasks that are measured, all by default.

    Raises:
        UserError: an invalid option, or one that names an unknown task.
    """

    preprocessing: Preprocessing | None = None
    """Preprocessing that the weights expect; the default for data without any."""

    @checked
    def __init__(
        self,
        tasks: Annotated[Mapping[str, Dataset[Any] | TargetMapping], NON_EMPTY],
        *,
        batch_size: Count = 500,
        evaluate_members: bool = False,
        joint: JointRule | None = "softmax",
        fast_dev_run: bool = False,
        only: Names | None = None,
    ) -> None:
        for name in only or ():
            check_choice("only", name, list(tasks))
        self._tasks: dict[str, Any] = {
            name: dataset for name, dataset in tasks.items() if only is None or name in only
        }
        self._classes: dict[str, LabelSpace | None] = {}
        self.batch_size = batch_size
        self.evaluate_members = evaluate_members
        self.joint = joint
        self.fast_dev_run = fast_dev_run

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks, in their order."""
        return list(self._tasks)

    def load_dataset(self, task: str) -> Any:
        """Return a task's images, built at the first call."""
        if is_target(self._tasks[task]):
            self._tasks[task] = load_dataset(self._tasks[task], self.preprocessing)
        return self._tasks[task]

    def classes(self, task: str) -> LabelSpace | None:
        """Return the classes of a task, or ``None`` where its data set names none."""
        if task not in self._classes:
            self._classes[task] = label_space(self.load_dataset(task))
        return self._classes[task]

    def check(self) -> None:
        """Build every task's data set, so that a missing file is found before any work."""
        for task in self._tasks:
            self.load_dataset(task)

    def evaluate(self, model: nn.Module, *, labels: LabelSpace | None = None) -> dict[str, Any]:
        """Return task → ``accuracy``, ``f1`` (weighted), ``loss``, ``images``, ``class_accuracy``.

        Accuracies and F1 are shares between 0 and 1; the loss is the mean cross-entropy in nats.

        Raises:
            UserError: every task has classes that the model lacks, or the model does not
                return one row of scores per image.
        """
        results = self.evaluate_all({"model": Contestant(lambda: model, labels)})["model"]
        if not results:
            raise UserError(
                f"the model answers none of the tasks {', '.join(self._tasks)}: "
                + (
                    "the classes of its outputs are unknown (pass labels)"
                    if labels is None
                    else f"each has classes beyond its outputs, which stand for {labels}"
                )
            )
        return results

    def evaluate_all(self, contestants: Mapping[str, Contestant]) -> dict[str, dict[str, Any]]:
        """Return name → result of :meth:`evaluate`; the images are read once for all networks.

        A network that answers no task gets an empty result.
        """
        found: dict[str, dict[str, Any]] = {}
        waiting = dict(contestants)
        while waiting:
            together: dict[str, tuple[nn.Module, LabelSpace | None]] = {}
            size = 0
            for name in list(waiting):
                if together and size > _TOGETHER_BYTES:
                    break
                contestant = waiting.pop(name)
                model = contestant.load()
                together[name] = (model, contestant.labels)
                size += sum(tensor.nbytes for tensor in model.state_dict().values())
            found |= self._evaluate_together(together)
        return found

    def _evaluate_together(
        self, models: Mapping[str, tuple[nn.Module, LabelSpace | None]]
    ) -> dict[str, dict[str, Any]]:
        spaces = {task: self.classes(task) for task in self._tasks}
        questions = dict(spaces)
        known = [space for space in spaces.values() if space is not None]
        everything = joint_space(known) if self.joint and len(known) == len(spaces) > 1 else None
        if everything is not None:
            questions[JOINT] = everything
        # For tasks that are not parts of one problem, outputs can be matched only by known classes.
        of_several = len(known) == len(spaces) and not any(
            all(space.covers(other) for other in known) for space in known
        )
        with contextlib.ExitStack() as stack:
            examinees = []
            for name, (model, labels) in models.items():
                network, device = stack.enter_context(self._ready(model))
                if (
                    labels is None
                    and of_several
                    and not isinstance(network, Ensemble | MultiTaskNetwork)
                ):
                    log.warning(
                        "The classes of '%s' are unknown, and the tasks ask for different ones: "
                        "it is not measured (the pool's option 'classes' names them)",
                        name,
                    )
                    continue
                answers = {
                    question: answer_of(
                        network, labels, question, classes, joint=self.joint or "softmax"
                    )
                    for question, classes in questions.items()
                }
                several = None
                # The further heads cost next to nothing; the tails of a cut network would not.
                if isinstance(network, MultiTaskNetwork) and network.own_layer() is not None:
                    several = network
                examinees.append(Examinee(name, device, answers, several))
            start = 0  # of the task's classes among all
            for task, classes in spaces.items() if examinees else ():
                self._pose(task, classes, examinees, everything, start)
                start += 0 if classes is None else len(classes)
        found = {examinee.name: examinee.results(questions) for examinee in examinees}
        return {name: found.get(name, {}) for name in models}

    def _pose(
        self,
        task: str,
        classes: LabelSpace | None,
        examinees: Sequence[Examinee],
        everything: LabelSpace | None,
        start: int,
    ) -> None:
        """Evaluate all networks on the images of one task.

        Args:
            task: its name.
            classes: its classes.
            examinees: the networks.
            everything: the classes of all tasks, where the joint problem is measured.
            start: number of the task's first class among them.
        """
        count = 0
        dataset = self.load_dataset(task)
        for images, targets in self._batches(dataset, examinees[0].device):
            count += len(images)
            if classes is None:
                classes = LabelSpace(tuple(range(int(labels_of(dataset).max()) + 1)))
            for examinee in examinees:
                shown, labels = images.to(examinee.device), targets.to(examinee.device)
                call = _once(self._call, examinee.tasks)
                examinee.answer(task, classes, shown, labels, call)
                if everything is not None:
                    examinee.answer(JOINT, everything, shown, labels + start, call)
        if not count:
            raise UserError(f"task '{task}' has no images")

    def _batches(self, dataset: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        rank = 0 if self.fabric is None else self.fabric.global_rank
        world_size = 1 if self.fabric is None else self.fabric.world_size
        return batches(
            dataset,
            batch_size=self.batch_size,
            device=device,
            limit=self.batch_size if self.fast_dev_run else None,
            rank=rank,
            world_size=world_size,
        )

    def _call(self, model: nn.Module, images: Tensor) -> Any:
        images = images.to(image_dtype(model))
        if self.fabric is None:
            return model(images)
        with self.fabric.autocast():
            return model(images)

    @contextlib.contextmanager
    def _ready(self, model: nn.Module) -> Iterator[tuple[nn.Module, torch.device]]:
        """Yield the model in evaluation mode on the right device; it is restored afterwards."""
        here = next((p.device for p in model.parameters()), torch.device("cpu"))
        device = here if self.fabric is None else self.fabric.device
        network = model if here == device else copy.deepcopy(model).to(device)
        modes = {module: module.training for module in network.modules()}
        network.eval()
        try:
            with torch.inference_mode():
                yield network, device
        finally:
            for module, mode in modes.items():
                module.training = mode


def _once(call: Call, tasks: MultiTaskNetwork | None) -> Call:
    """Return ``call`` with results cached for the same images.

    Args:
        call: runs a network.
        tasks: a network of several tasks that share their body.
    """
    outputs: dict[int, Any] = {}

    def run(network: nn.Module, images: Tensor) -> Any:
        if id(network) not in outputs and tasks is not None:
            found = call(_AllTasks(tasks), images)
            outputs.update({id(tasks.for_task(task)): output for task, output in found.items()})
        elif id(network) not in outputs:
            outputs[id(network)] = call(network, images)
        return outputs[id(network)]

    return run


class _AllTasks(nn.Module):
    """A network of several tasks that answers all of them."""

    def __init__(self, network: MultiTaskNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Any]:
        return self.network.outputs(images)
