"""Images of one or several data sets under the classes of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from fusion.data import label_space
from fusion.data.foreign_images import as_labelled
from fusion.data.image_tensors import ImageTensors
from fusion.data.labelled_images import LabelledImages
from fusion.data.view import ImageView, last_augmentation, part, rows_of
from fusion.errors import UserError
from fusion.labels import LabelSpace


def in_label_space(datasets: Sequence[Dataset[Any]], labels: LabelSpace) -> Dataset[Any]:
    """Return all images of the classes ``labels``, labelled by their place among them.

    Images of other classes are omitted. Equal labels of different data sets are never confused:
    classes are distinguished by name, or by original label where a data set names none.

    Args:
        datasets: one or several, which may have classes in common.
        labels: the classes, in the order of a network's outputs.

    Raises:
        UserError: a data set does not name its classes, or no data set has images of one
            of the classes.
    """
    parts: list[LabelledImages] = []
    present: set[int] = set()
    for dataset in datasets:
        images = as_labelled(dataset)
        known = label_space(dataset)
        if known is None:
            raise UserError(
                f"{images!r} does not name its classes, so its labels cannot be matched with "
                f"{labels}; give it class_names"
            )
        table = torch.full((len(known),), -1)
        for own in range(len(known)):
            place = labels.positions(known.select([own]))
            if place is not None:
                table[own] = place[0]
        placed = table[images.labels.cpu()]
        present |= set(torch.unique(placed).tolist()) - {-1}
        chosen = torch.nonzero(placed >= 0).squeeze(1)
        originals = tuple(range(len(labels))) if labels.labels is None else labels.labels
        parts.append(part(images, chosen, placed[chosen], labels.shown, originals))
    missing = [labels.shown[place] for place in range(len(labels)) if place not in present]
    if missing:
        raise UserError(
            f"the network has the classes {labels}, and no data set has images of "
            f"{', '.join(missing)}; add training data of every class"
        )
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[LabelledImages]) -> LabelledImages:
    """Return several sets under the same classes as one; in memory where all are of one shape."""
    first = parts[0]
    facts = {(p.mean, p.std) for p in parts}
    if len(facts) > 1:
        raise UserError(
            f"data sets that are trained on together must share mean and std; these have "
            f"{', '.join(map(str, sorted(map(str, facts))))}"
        )
    tensors = [p for p in parts if isinstance(p, ImageTensors)]
    if (
        len(tensors) == len(parts)
        and len({(t.images.shape[1:], t.images.dtype) for t in tensors}) == 1
    ):
        device = tensors[0].images.device
        return ImageTensors(
            torch.cat([t.images.to(device) for t in tensors]),
            torch.cat([t.labels.to(device) for t in tensors]),
            class_names=tensors[0].class_names,
            original_labels=first.original_labels,
            mean=tensors[0].mean,
            std=tensors[0].std,
            augmentation=tensors[0].augmentation,
        )
    return ImageView(
        parts,
        torch.cat([rows_of(number, torch.arange(len(p))) for number, p in enumerate(parts)]),
        torch.cat([p.labels.cpu() for p in parts]),
        class_names=first.class_names,
        original_labels=first.original_labels,
        mean=first.mean,
        std=first.std,
        augmentation=last_augmentation(first),
    )
