"""Checks of a run before it starts: pool, tasks and data against each other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import UserError, first_line
from fusion.labels import LabelSpace, joint_space
from fusion.method import BaseAlgorithm
from fusion.modelpool import BaseModelPool
from fusion.modelpool.base import SPLITS
from fusion.models import MultiTaskNetwork
from fusion.taskpool import BaseTaskPool, ClassificationTaskPool
from fusion.training import FineTuning

_PASS_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""Exceptions of a forward pass on images that do not fit."""


def check_run(
    algorithm: BaseAlgorithm,
    pool: BaseModelPool,
    tasks: BaseTaskPool | None,
    finetuning: FineTuning | None,
) -> None:
    """Check, before any work, that a run's parts fit together.

    One image of every task and every member's data passes through the architecture, on shapes
    alone where that is possible.

    Raises:
        UserError: the parts do not fit together.
    """
    algorithm.check_pool(pool)
    passes = Passes(pool)
    check_data(pool, passes)
    if tasks is not None:
        check_tasks(tasks, pool, passes)
    if finetuning is not None and not pool.has_data("train"):
        lacking = [name for name in pool.model_names if not pool.has_data("train", name)]
        raise UserError(
            f"fine-tuning needs training images of every expert, and the pool has none of "
            f"{', '.join(lacking) or 'its members'}; add train_datasets, or leave finetune out"
        )


class Passes:
    """Forward passes on shapes alone, one per architecture, shape and type of image."""

    def __init__(self, pool: BaseModelPool) -> None:
        self._pool = pool
        self._outputs: dict[tuple[str, torch.Size, torch.dtype], int | None] = {}

    def outputs(self, name: str, dataset: Any, what: str) -> int | None:
        """Return the number of outputs of a member; ``None`` if they are not a row of scores.

        Args:
            name: of the member.
            dataset: the data whose first image passes through it.
            what: the data in a message.

        Raises:
            UserError: the image does not pass through the member's architecture.
        """
        if not len(dataset):
            raise UserError(f"the {what}: there are no images")
        image = dataset[0][0]
        if not isinstance(image, Tensor):
            raise UserError(
                f"the {what} are of type {type(image).__name__}; end the transform in a tensor"
            )
        key = self._pool.entry(name).architecture_key, image.shape, image.dtype
        if key not in self._outputs:
            self._outputs[key] = _outputs_for(self._pool, name, image, what)
        return self._outputs[key]


def check_data(pool: BaseModelPool, passes: Passes) -> None:
    """Check that the images of the members fit the network, and their classes its outputs.

    Raises:
        UserError: a member does not fit.
    """
    seen: set[tuple[str, int]] = set()
    for name in pool.all_model_names:
        for split in SPLITS:
            if not pool.has_data(split, name):
                continue
            dataset = pool.dataset(name, split)
            if (name, id(dataset)) in seen:
                continue
            seen.add((name, id(dataset)))
            outputs = passes.outputs(name, dataset, f"{split} data of '{name}'")
            labels = pool.labels(name)
            if labels is not None and outputs is not None and len(labels) != outputs:
                raise UserError(
                    f"'{name}' has {outputs} outputs and {len(labels)} classes ({labels}); give "
                    f"it one class for each output: in its architecture, in its data, or as the "
                    f"pool's option 'classes'"
                )


def check_tasks(tasks: BaseTaskPool, pool: BaseModelPool, passes: Passes) -> None:
    """Check that the tasks can be evaluated on networks of this pool.

    Raises:
        UserError: a custom task pool whose ``evaluate`` cannot be called, images that do not
            fit the network, or classes unknown to all members.
    """
    signature = inspect.signature(tasks.evaluate)
    try:
        signature.bind(nn.Identity())
    except TypeError as error:
        raise UserError(
            f"{type(tasks).__name__}.evaluate{signature} cannot be called with a model alone "
            f"({error}); write evaluate(self, model) or evaluate(self, model, *, labels=None)"
        ) from error
    tasks.check()
    if not isinstance(tasks, ClassificationTaskPool):
        return
    known = {name: pool.labels(name) for name in pool.all_model_names}
    reference = pool.pretrained_or_first_name
    for task in tasks.task_names:
        classes = tasks.classes(task)
        named = [name for name in pool.model_names if pool.task(name) == task]
        dataset = tasks.load_dataset(task)
        passes.outputs((named or [reference])[0], dataset, f"images of task '{task}'")
        if classes is None or named or _answered(known, classes):
            continue
        raise UserError(
            f"task '{task}' asks for the classes {classes}, and no member of the pool knows them; "
            f"name it for its expert, or give the members' classes as the pool's option 'classes'"
        )


def _outputs_for(pool: BaseModelPool, name: str, image: Tensor, what: str) -> int | None:
    model = pool.architecture(name).eval()
    networks = list(model.networks) if isinstance(model, MultiTaskNetwork) else [model]
    for network in networks:
        try:
            with torch.inference_mode():
                output = network(image[None].to("meta"))
        except NotImplementedError:  # an operation that has no meta kernel: seen in the run itself
            return None
        except _PASS_ERRORS as error:
            raise UserError(
                f"the {what} do not fit '{name}': an image of {'×'.join(map(str, image.shape))} "
                f"(channels × height × width) does not pass through {type(network).__name__} "
                f"({first_line(error)}); change the data's channels or image_size"
            ) from error
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def _answered(known: Mapping[str, LabelSpace | None], classes: LabelSpace) -> bool:
    """Return whether a member, or the experts together, may have the classes."""
    spaces = [space for space in known.values() if space is not None]
    if len(spaces) < len(known):
        return True  # a member of unknown classes: decided by the number of its outputs
    if any(space.covers(classes) for space in spaces):
        return True
    experts = [
        s for name, s in known.items() if s is not None and not BaseModelPool.is_special_model(name)
    ]
    together = joint_space(experts)
    if together is not None and together.covers(classes):
        return True
    return all(
        any(space.covers(classes.select([place])) for space in spaces)
        for place in range(len(classes))
    )
