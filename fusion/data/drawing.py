"""Random draws of images from a set, balanced among the classes."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.foreign_images import as_labelled
from fusion.data.image_tensors import ImageTensors
from fusion.data.labelled_images import LabelledImages
from fusion.data.seeds import seed_from
from fusion.data.view import part
from fusion.options import Count, Seed, checked


@overload
def few(
    dataset: ImageTensors, n: int, *, seed: int = 0, stratified: bool = True
) -> ImageTensors: ...
@overload
def few(
    dataset: Dataset[Any], n: int, *, seed: int = 0, stratified: bool = True
) -> LabelledImages: ...
@checked
def few(
    dataset: Dataset[Any], n: Count, *, seed: Seed = 0, stratified: bool = True
) -> LabelledImages:
    """Return ``n`` images drawn without replacement, in random order; all if there are fewer.

    Args:
        dataset: the set to draw from, any map-style data set; a draw from :class:`ImageTensors` is
            :class:`ImageTensors`.
        n: number of images.
        seed: the same seed draws the same images; a larger ``n`` extends the draw.
        stratified: take turns among the classes, so that their counts differ by one at most
            while no class is exhausted; otherwise every image is as likely as any other.

    Raises:
        UserError: ``n`` is below 1.
    """
    images = as_labelled(dataset)
    labels = images.labels.cpu() if stratified else torch.zeros(len(images))
    drawn = stratified_order(labels, seed_from(seed, "few"))[:n]
    return part(
        images, drawn, images.labels.cpu()[drawn], images.class_names, images.original_labels
    )


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a random order of the indices of ``labels`` in which the classes take turns."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    turn = torch.empty_like(order)
    for label in torch.unique(labels):
        of_label = labels[order] == label
        turn[of_label] = torch.arange(int(of_label.sum()))
    return order[turn.argsort(stable=True)]
