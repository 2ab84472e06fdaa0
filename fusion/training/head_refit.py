"""Refit the head of a network on labelled images, as a measure of its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fusion.data import batches, labels_of
from fusion.errors import UserError
from fusion.training.restoring import ready
from fusion.weights import load_tensors

_PASSES = 300  # of L-BFGS, at most


@torch.inference_mode()
def head_features(
    model: nn.Module, head: str, dataset: Dataset[Any], *, batch_size: int = 500
) -> Tensor:
    """Return the inputs of a network's head for all images, (n, features), on the CPU.

    Args:
        model: the network; it is not changed.
        head: name of the linear layer that is its head.
        dataset: images with labels.
        batch_size: images per forward pass.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].float().cpu())
    )
    try:
        with ready(model, device):
            for images, _ in batches(dataset, batch_size=batch_size, device=device):
                model(images)
    finally:
        hook.remove()
    return torch.cat(found)


def refit_heads(
    networks: Mapping[str, nn.Module],
    datasets: Mapping[str, Dataset[Any]],
    head: Sequence[str],
    *,
    jointly: bool = False,
) -> None:
    """Replace the head of each network, in place, by logistic regression on its features.

    Args:
        networks: task → network.
        datasets: task → labelled images; labels number the outputs of that task's network.
        head: state-dict keys of the head, ``<layer>.weight`` and ``<layer>.bias`` of a linear
            layer.
        jointly: fit one regression over the classes of all tasks and give each network its rows,
            so that the scores of different tasks can be compared, where the networks have the same
            body; else one for each task.

    Raises:
        UserError: the head is more than one linear layer.
    """
    layer = _linear_layer(next(iter(networks.values())), head)
    features = {
        task: head_features(network, layer, datasets[task]) for task, network in networks.items()
    }
    outputs = {
        task: len(network.get_parameter(f"{layer}.weight")) for task, network in networks.items()
    }
    groups = [list(networks)] if jointly else [[task] for task in networks]
    for tasks in groups:
        starts = np.cumsum([0, *(outputs[task] for task in tasks)])
        labels = np.concatenate(
            [
                np.asarray(labels_of(datasets[task])) + start
                for task, start in zip(tasks, starts, strict=False)
            ]
        )
        weight, bias = _logistic_regression(
            torch.cat([features[task] for task in tasks]).numpy(), labels, int(starts[-1])
        )
        for task, start, stop in zip(tasks, starts, starts[1:], strict=False):
            state = {f"{layer}.weight": weight[start:stop], f"{layer}.bias": bias[start:stop]}
            load_tensors(networks[task], {key: state[key] for key in head})


def _linear_layer(model: nn.Module, head: Sequence[str]) -> str:
    layers = {key.rpartition(".")[0] for key in head}
    name = next(iter(layers))
    if len(layers) > 1 or not isinstance(model.get_submodule(name), nn.Linear):
        raise UserError(
            f"the head {', '.join(head)} is not one linear layer; only such a head can be refitted"
        )
    return name


def _logistic_regression(
    features: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], outputs: int
) -> tuple[Tensor, Tensor]:
    """Return weight (outputs, features) and bias (outputs,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_PASSES))
    model.fit(features, labels)
    scaler, regression = model[0], model[1]
    known = regression.coef_
    rows, offsets = (
        (known, regression.intercept_)
        if len(known) > 1
        else (
            np.concatenate([-known, known]) / 2,
            np.concatenate([-regression.intercept_, regression.intercept_]) / 2,
        )
    )
    weight = np.zeros((outputs, features.shape[1]))
    bias = np.full(outputs, offsets.min() - 1.0)  # a class without images never wins
    weight[regression.classes_] = rows / scaler.scale_
    bias[regression.classes_] = offsets - (rows / scaler.scale_) @ scaler.mean_
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
