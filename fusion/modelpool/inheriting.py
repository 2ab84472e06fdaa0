"""Initial weights of a network that is fine-tuned from another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.models import Head, find_head, select_rows
from fusion.weights import tensors_of

log = logging.getLogger(__name__)

HeadOrigin = Literal["auto", "rows", "fresh"]
_SHOWN = 3  # tensors named in an error before the rest is counted


def inherit(
    parent: Mapping[str, Tensor],
    model: nn.Module,
    *,
    head: str = "auto",
    named_head: Sequence[str] | None = None,
    known: LabelSpace | None,
    wanted: LabelSpace | None,
    parent_name: str,
) -> dict[str, Tensor]:
    """Return the weights that ``model`` starts from: its parent's, and a head for its classes.

    Args:
        parent: the parent's state dict.
        model: the network with fresh weights.
        head: ``rows`` (the parent's rows for the classes wanted), ``fresh`` (``model``'s own) or
            ``auto`` (rows where the parent has all classes, or where the classes are unknown and
            the shapes agree; else fresh).
        named_head: modules or tensors that are the head; by default it is found from the graph.
        known: the parent's classes.
        wanted: the classes of ``model``.
        parent_name: name of the parent in errors.

    Raises:
        UserError: the bodies differ, or rows were requested that the parent does not have.
    """
    fresh = tensors_of(model)
    found = find_head(model, named=named_head)
    _check_body(parent, fresh, found, parent_name)
    rows = None if known is None or wanted is None else known.positions(wanted)
    same_shapes = all(parent[key].shape == fresh[key].shape for key in found.tensors)
    nobody_knows = known is None or wanted is None
    if head == "fresh" or (head == "auto" and rows is None and not (nobody_knows and same_shapes)):
        return {key: fresh[key] if key in found else parent[key] for key in fresh}
    if rows is None and nobody_knows and same_shapes:
        return dict(parent)
    if rows is None or known is None:
        raise UserError(
            f"head=rows takes the head's rows from '{parent_name}', which knows "
            f"{f'the classes {known}' if known else 'no names of its classes'}; this model's are "
            f"{wanted or 'unknown'}; use head=fresh"
        )
    # If the user named a head larger than the last layer, only the last layer has rows.
    last = Head(tuple(key for key in find_head(model).tensors if key in found))
    selected = select_rows(parent, last, rows, classes=len(known))
    for key, tensor in selected.items():
        if tensor.shape != fresh[key].shape:
            raise UserError(
                f"{key} has {len(fresh[key])} rows in the architecture, and there are "
                f"{len(rows)} classes; give the architecture one output for each class"
            )
    return {**parent, **selected}


def _check_body(
    parent: Mapping[str, Tensor], fresh: Mapping[str, Tensor], head: Head, name: str
) -> None:
    unlike = [
        key
        for key in dict.fromkeys([*fresh, *parent])
        if key not in parent
        or key not in fresh
        or (key not in head and parent[key].shape != fresh[key].shape)
    ]
    if unlike:
        more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
        raise UserError(
            f"init_from='{name}' has another body: {', '.join(unlike[:_SHOWN])}{more} "
            f"{'are' if len(unlike) > 1 else 'is'} missing or of another shape in one of the two; "
            f"give both the same architecture up to the head"
        )
