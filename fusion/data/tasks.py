"""Derived tasks on the same images: coarser classes, and recognition of a rotation.

Both take any image set; for :class:`~fusion.data.ImageTensors` they return ``ImageTensors``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.class_subset import class_name, label_of, merge_labels
from fusion.data.foreign_images import as_labelled
from fusion.data.labelled_images import LabelledImages
from fusion.data.labels import new_labels
from fusion.data.seeds import seed_from
from fusion.data.view import changed, part
from fusion.errors import UserError
from fusion.options import NON_EMPTY, Classes, Seed, checked

_TURNS = ("0°", "90°", "180°", "270°")


@checked
def grouped(
    dataset: Dataset[Any], groups: Annotated[Mapping[str, Classes], NON_EMPTY]
) -> LabelledImages:
    """Return the images under coarser labels, such as even and odd digits.

    The groups are new classes, with original labels that no other classes have.

    Args:
        dataset: the images.
        groups: name of the group → labels or names of its classes. Images of a class that is in
            no group are omitted.

    Raises:
        UserError: a class is unknown or in two groups, a group has no images, or the name of a
            group is that of a class which is not the whole of it.
    """
    images = as_labelled(dataset)
    members = [[label_of(images, name) for name in classes] for classes in groups.values()]
    flat = [label for group in members for label in group]
    twice = sorted({class_name(images, label) for label in flat if flat.count(label) > 1})
    if twice:
        raise UserError(f"groups: {twice} are named twice; a class belongs to one group")
    for name, group in zip(groups, members, strict=True):
        _check_new([name], [n for n in images.class_names or () if [label_of(images, n)] != group])
    indices, labels = merge_labels(images, members)
    present = set(torch.unique(labels).tolist())
    empty = [name for number, name in enumerate(groups) if number not in present]
    if empty:
        raise UserError(f"groups: {images!r} has no images for the groups {empty}; leave them out")
    return part(images, indices, labels, list(groups), new_labels(list(groups)))


@checked
def quarter_turns(dataset: Dataset[Any], *, seed: Seed = 0) -> LabelledImages:
    """Return each image turned by a random quarter turn, which is its label.

    Recognising the rotation is a task that needs no labels (Gidaris et al., 2018, "Unsupervised
    Representation Learning by Predicting Image Rotations").

    Args:
        dataset: square images.
        seed: of the turns; each image always has the same one, counter-clockwise.

    Raises:
        UserError: the images are not square, which a set that is not in memory shows when it is
            read; or the data set has classes named like turns.
    """
    images = as_labelled(dataset)
    _check_new(_TURNS, images.class_names or ())
    generator = torch.Generator().manual_seed(seed_from(seed, "quarter turns"))
    turns = torch.randint(len(_TURNS), (len(images),), generator=generator)
    return changed(images, partial(_turned, turns=turns), labels=turns, class_names=_TURNS)


def _turned(pixels: Tensor, numbers: Tensor, *, turns: Tensor) -> Tensor:
    if pixels.shape[-1] != pixels.shape[-2]:
        raise UserError(
            f"quarter_turns: the images have {pixels.shape[-2]}x{pixels.shape[-1]} pixels, and a "
            f"quarter turn exchanges the sides; give square images"
        )
    result = pixels.clone()
    for turn in range(1, len(_TURNS)):
        chosen = (turns[numbers] == turn).to(pixels.device)
        result[chosen] = torch.rot90(pixels[chosen], turn, (-2, -1))
    return result


def _check_new(names: Iterable[str], known: Iterable[str]) -> None:
    taken = sorted(set(names) & set(known))
    if taken:
        raise UserError(
            f"class names: {taken} are classes of the data set, and the new task means something "
            f"else by them; classes are distinguished by their names"
        )
