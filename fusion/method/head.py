"""The head: tensors whose shape differs between members, and what a merge makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.modelpool import PRETRAINED, BaseModelPool
from fusion.weights import TensorSource


def check_union(modelpool: BaseModelPool) -> None:
    """Check that the pool knows which classes the outputs of every expert stand for.

    Raises:
        UserError: names the experts whose classes nobody said.
    """
    unknown = [name for name in modelpool.model_names if modelpool.classes(name) is None]
    if unknown:
        raise UserError(
            f"head=union needs the classes of every expert, and those of {', '.join(unknown)} are "
            f"not known; give them as the pool's classes: {{name: [original labels]}}"
        )


def union_labels(modelpool: BaseModelPool, base_outputs: int) -> tuple[int, ...]:
    """Return the original labels of a union head: the base's where it knows all the experts'.

    Otherwise they are the experts' labels alone, ascending, and the base's rows are dropped.
    """
    known = {label for name in modelpool.model_names for label in modelpool.classes(name) or ()}
    labels = modelpool.classes(PRETRAINED) or tuple(range(base_outputs))
    return labels if known <= set(labels) else tuple(sorted(known))


def unite(
    merged: dict[str, Tensor],
    base: Mapping[str, Tensor],
    experts: Mapping[str, TensorSource],
    modelpool: BaseModelPool,
) -> tuple[int, ...] | None:
    """Put the union of the experts' heads into ``merged``; return the labels of its outputs.

    Where all heads have one shape there is nothing to unite, and the base's labels are returned.
    """
    keys = [
        key
        for key in base
        if base[key].is_floating_point()
        and any(source.info(key).shape != tuple(base[key].shape) for source in experts.values())
    ]
    if not keys:
        return modelpool.classes(PRETRAINED)
    outputs = base[keys[0]].shape[0]
    own = modelpool.classes(PRETRAINED) or tuple(range(outputs))
    labels = union_labels(modelpool, outputs)
    for key in keys:
        parts = [(source[key], modelpool.classes(name) or ()) for name, source in experts.items()]
        merged[key] = union_rows(base[key], own, parts, labels)
    return labels


def union_rows(
    base: Tensor,
    base_labels: Sequence[int],
    experts: Sequence[tuple[Tensor, Sequence[int]]],
    labels: Sequence[int],
) -> Tensor:
    """Return a head tensor whose row for each label is the mean of the experts' that know it.

    A label that no expert knows keeps the base's row.

    Args:
        base: (classes of the base, …).
        base_labels: the original labels of its rows.
        experts: each expert's tensor (its classes, …) and the original labels of its rows.
        labels: the original labels of the result's rows, in order.
    """
    rows = []
    for label in labels:
        found = [tensor[list(own).index(label)] for tensor, own in experts if label in own]
        if found:
            rows.append(torch.stack([row.to(torch.float32) for row in found]).mean(0))
        else:
            rows.append(base[list(base_labels).index(label)].to(torch.float32))
    return torch.stack(rows).to(base.dtype)


def resize(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the head's module of ``model`` the output size that ``state`` has, in place."""
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        module = model.get_submodule(owner)
        held = getattr(module, name)
        if isinstance(held, nn.Parameter) and held.shape != tensor.shape:
            empty = held.new_empty(tensor.shape)
            setattr(module, name, nn.Parameter(empty, requires_grad=held.requires_grad))
            for size in ("out_features", "out_channels"):
                if hasattr(module, size):
                    setattr(module, size, tensor.shape[0])
