"""The labelled images that the result of a method is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from fusion.data.relabelling import in_label_space
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.method.base import BaseAlgorithm
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.training.feeding import TrainingData


def training_data(model: nn.Module, algorithm: BaseAlgorithm, pool: BaseModelPool) -> TrainingData:
    """Return the training images of a pool, labelled by the outputs of a result.

    Args:
        model: the result.
        algorithm: states the classes of its outputs.
        pool: has the images.

    Raises:
        UserError: the classes of a head whose images come from several data sets are unknown.
    """
    if isinstance(model, MultiTaskNetwork):
        return {
            task: _labelled(pool, pool.tasks.get(task, pool.model_names), model.labels[task])
            for task in model.tasks
        }
    return _labelled(pool, pool.model_names, algorithm.result_labels(pool))


def _labelled(pool: BaseModelPool, names: list[str], labels: LabelSpace | None) -> Dataset[Any]:
    images = pool.images(names)
    datasets = list(images.values()) if isinstance(images, Mapping) else [images]
    if labels is not None:
        return in_label_space(datasets, labels)
    if len(datasets) > 1:
        raise UserError(
            f"fine-tuning on the data of {', '.join(names)} together needs the classes of the "
            f"result's outputs, which are unknown; give the pool's option 'classes'"
        )
    only: Dataset[Any] = datasets[0]
    return only
