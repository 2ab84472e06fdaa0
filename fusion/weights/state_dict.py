"""Arithmetic on whole state dicts, strict about keys and shapes.

All functions follow one rule: arithmetic is on floating-point tensors, in float32 or better, with
the result in the dtype of the first operand. Integer and boolean buffers (``num_batches_tracked``
has no mean) are carried over from the first operand; a vector leaves them out. Results are new
tensors, in the key order of the first operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fusion.errors import UserError, suggestion
from fusion.weights.linear import weighted_mean
from fusion.weights.operands import working_operands

StateDict: TypeAlias = Mapping[str, Tensor]

NAMED_AT_MOST = 8  # maximum number of keys listed in an error message


def state_dict_add(a: StateDict, b: StateDict) -> dict[str, Tensor]:
    """Return ``a + b``; integer buffers are those of ``a``.

    Raises:
        UserError: keys or shapes differ.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dict_add
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> b = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)}
        >>> state_dict_add(a, b)
        {'w': tensor([4., 8.]), 'steps': tensor(7)}
    """
    return state_dict_weighted_sum([a, b], [1.0, 1.0])


def state_dict_sub(a: StateDict, b: StateDict) -> dict[str, Tensor]:
    """Return ``a - b`` (the task vector, if ``b`` is the base); integer buffers are those of ``a``.

    Raises:
        UserError: keys or shapes differ.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dict_sub
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> b = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)}
        >>> state_dict_sub(b, a)
        {'w': tensor([2., 4.]), 'steps': tensor(9)}
    """
    return state_dict_weighted_sum([a, b], [1.0, -1.0])


def state_dict_mul(state_dict: StateDict, factor: float) -> dict[str, Tensor]:
    """Return ``factor * state_dict``; integer buffers are carried over.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dict_mul
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> state_dict_mul(a, 0.5)
        {'w': tensor([0.5000, 1.0000]), 'steps': tensor(7)}
    """
    return state_dict_weighted_sum([state_dict], [factor])


def state_dict_avg(state_dicts: Sequence[StateDict]) -> dict[str, Tensor]:
    """Return the mean of ``state_dicts``; integer buffers are those of the first.

    Raises:
        UserError: no state dict, or keys or shapes differ.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dict_avg
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> b = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)}
        >>> state_dict_avg([a, b])
        {'w': tensor([2., 4.]), 'steps': tensor(7)}
    """
    return _combine(state_dicts, weighted_mean)


def state_dict_weighted_sum(
    state_dicts: Sequence[StateDict], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the sum of ``weights[i] * state_dicts[i]``; integer buffers are those of the first.

    The weights are not normalised; they may have any sign and any sum.

    Raises:
        UserError: no state dict, not one weight for each, or keys or shapes differ.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dict_weighted_sum
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> b = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)}
        >>> state_dict_weighted_sum([a, b], [1.0, -0.5])
        {'w': tensor([-0.5000, -1.0000]), 'steps': tensor(7)}
    """
    if len(weights) != len(state_dicts):
        raise UserError(
            f"there are {len(weights)} weights for {len(state_dicts)} state dicts; "
            f"give one for each"
        )

    def weighted_sum(tensors: Sequence[Tensor]) -> Tensor:
        operands = working_operands(tensors)
        total = operands[0] * float(weights[0])
        for tensor, weight in zip(operands[1:], weights[1:], strict=True):
            total.add_(tensor, alpha=float(weight))
        return total.to(tensors[0].dtype)

    return _combine(state_dicts, weighted_sum)


def state_dict_to_vector(state_dict: StateDict) -> Tensor:
    """Return all floating-point tensors of ``state_dict`` as one flat vector.

    Tensors follow each other in key order, each in C order whatever its memory format. Integer
    buffers are omitted. The dtype is the widest one of the tensors, float32 for none.

    Example::

        >>> import torch
        >>> from fusion.weights import state_dict_to_vector
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> state_dict_to_vector(a)
        tensor([1., 2.])
    """
    flat = [tensor.detach().reshape(-1) for tensor in state_dict.values() if _has_mean(tensor)]
    return torch.cat(flat) if flat else torch.zeros(0)


def vector_to_state_dict(vector: Tensor, like: StateDict) -> dict[str, Tensor]:
    """Return ``vector`` as a state dict with the keys, shapes and dtypes of ``like``.

    The inverse of ``state_dict_to_vector``. Integer buffers are those of ``like``.

    Raises:
        UserError: the vector does not have as many elements as ``like`` has floating-point ones.

    Example::

        >>> import torch
        >>> from fusion.weights import vector_to_state_dict
        >>> a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
        >>> vector_to_state_dict(torch.tensor([5.0, 6.0]), like=a)
        {'w': tensor([5., 6.]), 'steps': tensor(7)}
    """
    needed = sum(tensor.numel() for tensor in like.values() if _has_mean(tensor))
    if vector.shape != (needed,):
        raise UserError(
            f"the vector has the shape {tuple(vector.shape)}, the floating-point tensors of the "
            f"state dict have {needed:,} elements; a vector fits the state dict it came from"
        )
    result: dict[str, Tensor] = {}
    start = 0
    for name, tensor in like.items():
        if not _has_mean(tensor):
            result[name] = tensor.detach().clone()
            continue
        part = vector.detach()[start : start + tensor.numel()]
        result[name] = part.reshape(tensor.shape).to(tensor.dtype, copy=True)
        start += tensor.numel()
    return result


def trainable_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of ``module`` that require a gradient, detached, not copied.

    A parameter that is shared under several names is listed under its first one only.

    Example::

        >>> import torch
        >>> from fusion.weights import trainable_state_dict
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.bias.requires_grad_(False)
        >>> list(trainable_state_dict(model))
        ['weight']
    """
    return {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def require_same_keys(state_dicts: Sequence[StateDict], names: Sequence[str] | None = None) -> None:
    """Check that all ``state_dicts`` have the keys and shapes of the first one.

    Args:
        state_dicts: one or more.
        names: their names in the message; by default their positions.

    Raises:
        UserError: names the first state dict that differs, and its keys.

    Example::

        >>> import torch
        >>> from fusion.weights import require_same_keys
        >>> a, b = {"fc.weight": torch.zeros(2)}, {"fc.weigth": torch.zeros(2)}
        >>> require_same_keys([a, b], ["base", "expert"])
        Traceback (most recent call last):
            ...
        fusion.errors.UserError: expert lacks 'fc.weight' and also has 'fc.weigth'; ...
    """
    names = names or [f"state dict {position}" for position in range(len(state_dicts))]
    first = state_dicts[0]
    for name, other in zip(names[1:], state_dicts[1:], strict=True):
        missing = [key for key in first if key not in other]
        added = [key for key in other if key not in first]
        if missing or added:
            faults = [f"lacks {_listed(missing)}"] if missing else []
            faults += [f"also has {_listed(added)}"] if added else []
            hint = suggestion(missing[0], added) if missing else ""
            raise UserError(
                f"{name} {' and '.join(faults)}; it must have the keys of {names[0]}{hint}"
            )
        reshaped = [
            f"{key} is {tuple(other[key].shape)} instead of {tuple(first[key].shape)}"
            for key in first
            if other[key].shape != first[key].shape
        ]
        if reshaped:
            raise UserError(
                f"{name} does not have the shapes of {names[0]}: "
                f"{'; '.join(reshaped[:NAMED_AT_MOST])}{_rest(reshaped)}"
            )


def _combine(
    state_dicts: Sequence[StateDict], kernel: Callable[[Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Apply ``kernel`` to the tensors of each key; carry over tensors that have no mean."""
    if not state_dicts:
        raise UserError("there is nothing to add up: give at least one state dict")
    require_same_keys(state_dicts)
    combined: dict[str, Tensor] = {}
    for name, tensor in state_dicts[0].items():
        if _has_mean(tensor):
            combined[name] = kernel([state_dict[name] for state_dict in state_dicts])
        else:
            combined[name] = tensor.detach().clone()
    return combined


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:NAMED_AT_MOST]) + _rest(keys)


def _rest(items: Sequence[str]) -> str:
    return f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
