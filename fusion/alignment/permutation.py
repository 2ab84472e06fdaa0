"""Permutations of the units of a network: draw, apply, invert, compose.

A permutation ``p`` of a group of n units is an int64 tensor of shape (n,): afterwards, place i
holds the unit that was at place ``p[i]``. Groups of units apply before groups of blocks.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from fusion.alignment.copies import copied
from fusion.alignment.spec import Entry, Group, PermutationSpec
from fusion.errors import UserError, suggestion

Permutations = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def identity_permutation(spec: PermutationSpec) -> dict[str, Tensor]:
    """Return the identity permutation of every group.

    Example::

        >>> import torch
        >>> from fusion.alignment import identity_permutation, permutation_spec
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> all(p.tolist() == sorted(p.tolist()) for p in identity_permutation(spec).values())
        True
    """
    return {group.name: torch.arange(group.size, device="cpu") for group in spec.groups}


def random_permutation(spec: PermutationSpec, seed: int = 0) -> dict[str, Tensor]:
    """Draw a permutation of every group, each from ``seed`` and the group's name alone.

    Example::

        >>> import torch
        >>> from fusion.alignment import apply_permutation, permutation_spec, random_permutation
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> other = apply_permutation(model, spec, random_permutation(spec, seed=1))
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.equal(model.conv1.weight, other.conv1.weight)
        False
        >>> torch.allclose(model(images), other(images), atol=1e-5)
        True
    """
    drawn = {}
    for group in spec.groups:
        drawn[group.name] = random_order(group.size, f"{seed}/{group.name}")
    return drawn


def random_order(n: int, key: str) -> Tensor:
    """Draw an order of ``n`` items from ``key`` alone: (n,) int64 on the CPU."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(n, generator=generator, device="cpu")


def inverse(spec: PermutationSpec, permutations: Permutations) -> dict[str, Tensor]:
    """Return the permutation that undoes ``permutations``.

    Example::

        >>> import torch
        >>> from fusion.alignment import apply_permutation, inverse
        >>> from fusion.alignment import permutation_spec, random_permutation
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> drawn = random_permutation(spec)
        >>> there = apply_permutation(model, spec, drawn)
        >>> back = apply_permutation(there, spec, inverse(spec, drawn))
        >>> torch.equal(model.conv1.weight, back.conv1.weight)
        True
    """
    full = _complete(spec, permutations)
    result = {name: torch.argsort(p) for name, p in full.items()}
    for blocks in spec.groups:
        for place, source in enumerate(full[blocks.name].tolist() if blocks.members else ()):
            # Place b holds the previous content of block source: there the units must be put back.
            pairs = zip(blocks.members[place], blocks.members[source], strict=True)
            result.update({here: torch.argsort(full[there]) for here, there in pairs})
    return result


def compose(spec: PermutationSpec, first: Permutations, then: Permutations) -> dict[str, Tensor]:
    """Return the composition of ``first`` and ``then``.

    Example::

        >>> import torch
        >>> from fusion.alignment import apply_permutation, compose
        >>> from fusion.alignment import permutation_spec, random_permutation
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> a, b = random_permutation(spec, 1), random_permutation(spec, 2)
        >>> steps = apply_permutation(apply_permutation(model, spec, a), spec, b)
        >>> once = apply_permutation(model, spec, compose(spec, a, b))
        >>> torch.equal(steps.conv1.weight, once.conv1.weight)
        True
    """
    a, b = _complete(spec, first), _complete(spec, then)
    result = {name: p[b[name]] for name, p in a.items()}
    for blocks in spec.groups:
        for place, source in enumerate(a[blocks.name].tolist() if blocks.members else ()):
            pairs = zip(blocks.members[place], blocks.members[source], strict=True)
            result.update({there: a[there][b[here]] for here, there in pairs})
    return result


@overload
def apply_permutation(
    target: Module, spec: PermutationSpec, permutations: Permutations
) -> Module: ...


@overload
def apply_permutation(
    target: Mapping[str, Tensor], spec: PermutationSpec, permutations: Permutations
) -> dict[str, Tensor]: ...


def apply_permutation(
    target: nn.Module | Mapping[str, Tensor], spec: PermutationSpec, permutations: Permutations
) -> nn.Module | dict[str, Tensor]:
    """Return a copy of a network, or of its state dict, with its units permuted.

    Groups that ``permutations`` does not name are not changed. A state dict keeps its
    ``_metadata``. A tensor may be longer or shorter than in the spec along axes that no group
    permutes (a head for other classes).

    Raises:
        UserError: a group that the spec does not have, something that is not a permutation of the
            group's size, or a tensor that is missing or too short.

    Example::

        >>> import torch
        >>> from fusion.alignment import apply_permutation, permutation_spec
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> group = spec.groups[0]
        >>> reversed_units = {group.name: torch.arange(group.size).flip(0)}
        >>> other = apply_permutation(model, spec, reversed_units)
        >>> torch.equal(other.conv1.weight, model.conv1.weight.flip(0))
        True
    """
    check_permutations(spec, permutations)
    if isinstance(target, nn.Module):
        module = copied(target)
        tensors = module.state_dict()  # views of the copy's own tensors
        for key, value in _permuted(target.state_dict(), spec, permutations):
            tensors[key].copy_(value)
        return module
    # A dict with its `_metadata`, where torch made it.
    result: dict[str, Tensor] = copy.copy(target) if isinstance(target, dict) else dict(target)
    result.update(_permuted(target, spec, permutations))
    return result


def _permuted(
    tensors: Mapping[str, Tensor], spec: PermutationSpec, permutations: Permutations
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that ``permutations`` touch, permuted, one at a time."""
    for key, parts in spec.by_tensor.items():
        chosen = [
            (group, entry, permutations[group.name])
            for group, entry in parts
            if group.name in permutations
        ]
        if not chosen:
            continue
        if key not in tensors:
            raise UserError(
                f"the state dict lacks the tensor '{key}' that group '{chosen[0][0].name}' "
                f"permutes{suggestion(key, tensors)}; the spec belongs to another architecture"
            )
        yield key, permute_tensor(tensors[key], key, chosen)


def permute_tensor(value: Tensor, name: str, parts: list[tuple[Group, Entry, Tensor]]) -> Tensor:
    """Return ``value`` with the entries of ``parts`` permuted, units before blocks."""
    shape, (view, *_) = value.shape, {entry.view for _, entry, _ in parts}
    if view is not None:
        if math.prod(view) != value.numel():
            raise UserError(
                f"'{name}' has shape {tuple(shape)}, which cannot be read as {view}; the spec "
                f"belongs to another architecture"
            )
        value = value.reshape(view)
    units = [(entry, p) for group, entry, p in parts if not group.members]
    blocks = [(entry, p) for group, entry, p in parts if group.members]
    for stage in (units, blocks):
        confined = [(entry, p) for entry, p in stage if entry.rows is not None]
        if confined:
            value = _permute_rows(value, name, confined)
        for axis in sorted({entry.axis for entry, _ in stage if entry.rows is None}):
            index = torch.arange(value.shape[axis], device="cpu")
            for entry, p in stage:
                if entry.axis == axis and entry.rows is None:
                    _check_reach(value, name, entry)
                    index[entry.positions] = entry.positions[p.cpu()]
            value = value.index_select(axis, index.to(value.device))
    return value.reshape(shape)


def _permute_rows(value: Tensor, name: str, parts: list[tuple[Entry, Tensor]]) -> Tensor:
    """Permute along axis 1 within some rows of axis 0, other rows in other ways."""
    index = torch.arange(value.shape[1], device="cpu").repeat(value.shape[0], 1)
    for entry, p in parts:
        _check_reach(value, name, entry)
        assert entry.rows is not None
        row = index[entry.rows[0]].clone()
        row[entry.positions] = row[entry.positions[p.cpu()]]
        index[slice(*entry.rows)] = row
    index = index.view(*index.shape, *[1] * (value.ndim - 2)).to(value.device)
    return value.gather(1, index.expand(value.shape))


def check_permutations(spec: PermutationSpec, permutations: Permutations) -> None:
    """Check that each is a permutation of a group of ``spec``.

    Raises:
        UserError: one is not.
    """
    for name, p in permutations.items():
        group = spec.by_name.get(name)
        if group is None:
            raise UserError(f"the spec has no group '{name}'{suggestion(name, spec.by_name)}")
        if p.dtype != torch.int64 or p.ndim != 1 or sorted(p.tolist()) != list(range(group.size)):
            raise UserError(
                f"group '{name}' has {group.size} places; its permutation must hold each of "
                f"0…{group.size - 1} once, as int64; got {p.dtype} of shape {tuple(p.shape)}"
            )


def _check_reach(value: Tensor, name: str, entry: Entry) -> None:
    if entry.axis >= value.ndim or int(entry.positions.max()) >= value.shape[entry.axis]:
        raise UserError(
            f"'{name}' has shape {tuple(value.shape)}, too small for the group's place "
            f"{entry}; the spec belongs to another architecture"
        )


def _complete(spec: PermutationSpec, permutations: Permutations) -> dict[str, Tensor]:
    check_permutations(spec, permutations)
    return {**identity_permutation(spec), **permutations}
