"""Example inputs for networks, sufficient to find symmetries from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusion.alignment.tracing import trace
from fusion.alignment.untraceable import DoesNotFitError
from fusion.errors import UserError

# Sides of the square images that networks are designed for: ImageNet, Inception v3, CIFAR, Tiny
# ImageNet, MNIST, and scikit-learn's digits. Large ones first: where many sides fit, all give the
# same symmetries, and networks that reduce the resolution often accept only these.
SIDES = (224, 299, 32, 64, 28, 8)


def example_input_for(model: nn.Module, shape: Sequence[int] | None = None) -> Tensor:
    """Return zeros of a shape that ``model`` accepts, with batch axis 1, on the model's device.

    The channels are those of the first convolution or linear layer that was registered, the sides
    the first of ``SIDES`` that fit. Only shapes are run: that costs as much as a trace.

    Args:
        model: a network.
        shape: of one input, without its batch axis (C, H, W); only checked then, not guessed.

    Raises:
        UserError: the network cannot be traced, or no tried shape fits.
    """
    if shape is not None and not _is_shape(shape):
        raise UserError(
            f"example_input: {shape!r} is no shape; give that of one image as "
            f"[channels, height, width]"
        )
    shapes = [tuple(shape)] if shape is not None else _guesses(model)
    for candidate in shapes:
        example = _zeros(model, candidate)
        try:
            trace(model, [example])
        except DoesNotFitError:
            if shape is not None:
                raise
        else:
            return example
    tried = ", ".join(str(candidate) for candidate in shapes)
    raise UserError(
        f"no example input was found for {type(model).__name__} "
        f"({f'tried {tried}' if tried else 'it has no convolution or linear layer'}); "
        f"give the shape of one image as example_input: [channels, height, width]"
    )


def check_traceable(model: nn.Module) -> None:
    """Check that the forward pass depends on shapes only, as far as possible without data.

    Raises:
        UserError: it requires values. Nothing is raised if no tried shape fits.
    """
    for candidate in _guesses(model):
        try:
            trace(model, [_zeros(model, candidate)])
        except DoesNotFitError:
            continue
        return


def _zeros(model: nn.Module, shape: Sequence[int]) -> Tensor:
    parameter = next(model.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)


def _is_shape(shape: object) -> bool:
    return isinstance(shape, Sequence) and all(isinstance(n, int) and n > 0 for n in shape)


def _guesses(model: nn.Module) -> list[tuple[int, ...]]:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return [(module.in_channels, *[side] * len(module.kernel_size)) for side in SIDES]
        if isinstance(module, nn.Linear):
            return [(module.in_features,)]
    return []
