"""Find the groups of units that can be permuted without changing a network's function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fusion.alignment.labeller import Labeller
from fusion.alignment.spec import PermutationSpec
from fusion.alignment.tracing import trace
from fusion.alignment.writing import written
from fusion.errors import UserError


def permutation_spec(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    forward: Callable[..., Any] | None = None,
) -> PermutationSpec:
    """Find the groups of units of ``model`` that may be permuted without changing its function.

    The forward pass runs once in eval mode, without weights, on the shape of ``example_input``, and
    its elementary operations are recorded; parameters that only training mode uses (auxiliary
    heads) are found in a second run. Positions without a proven symmetry are left fixed and named
    in ``spec.fixed``.

    The result holds for every input on which the forward pass calls the same operations. Where
    Python code branches on a shape, that is the branch which ``example_input`` takes (most networks
    have only one). Batch size does not matter.

    Args:
        model: A network in eval mode; it is not changed.
        example_input: An input as the network takes it, batch axis included (N, C, H, W); a tuple
            for several arguments. Only its shape matters.
        forward: The relevant part of the network, where its own forward pass depends on more than
            shapes (a detector's anchors and non-maximum suppression): called as ``forward(model,
            *example_input)``, with a copy of the model. Parameters that it does not use stay in
            place.

    Raises:
        UserError: the model is in training mode, cannot be traced, or does not take the input.

    Example::

        >>> import torch
        >>> from fusion.alignment import permutation_spec
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> [group.size for group in spec.groups]
        [16, 16, 32, 16, 64, 32]

    Of a detector, only what comes before its anchors::

        def heads(detector, images):
            return detector.head(list(detector.backbone(images).values()))

        spec = permutation_spec(retinanet, torch.zeros(1, 3, 128, 128), forward=heads)
    """
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise UserError(
            f"example_input is {example_input!r}; give a tensor as the network takes it, such as "
            f"torch.zeros(1, 3, 32, 32), or a tuple of tensors"
        )
    require_eval_mode(model, "the model")
    with on_cpu(), torch.no_grad():  # labels live there, whatever the default device
        labeller = Labeller(model)
        labeller.walk(trace(model, inputs, forward=forward))
        parameters = {name for name, _ in model.named_parameters()}
        if forward is None and not parameters <= labeller.reached():
            # Batch norm in training mode cannot run on one image of one pixel.
            pairs = [torch.cat([x, x]) for x in inputs]
            try:
                recorded = trace(model, pairs, training=True)
            except UserError:
                pass  # it may need a larger image: its parameters are listed as unused
            else:
                labeller.walk(recorded)
        return written(labeller, model)


def on_cpu() -> AbstractContextManager[Any]:
    """Return a context in which tensors are made on the CPU."""
    if torch.get_default_device().type == "cpu":
        return nullcontext()  # the context of a device intercepts every call
    return torch.device("cpu")


def require_eval_mode(model: nn.Module, which: str) -> None:
    """Check that no module of ``model`` is in training mode.

    Raises:
        UserError: one is.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f"its module '{training[0]}'" if training[0] else type(model).__name__
        raise UserError(
            f"{which} must be in eval mode (batch statistics and dropout hide what a permutation "
            f"changes), but {where} is in training mode; call .eval() first"
        )
