"""Freeze layers of a network: train some of them and leave the others unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fusion.errors import UserError, suggestion


@dataclass(frozen=True)
class Frozen:
    """Result of :func:`freeze`.

    Attributes:
        model: the network.
        trained: names of the parameters that are trained, in the order of the network.
        norms: the normalisations that keep their running statistics.
    """

    model: nn.Module
    trained: tuple[str, ...]
    norms: tuple[nn.Module, ...]

    def train(self) -> None:
        """Set the network to training mode, except for the frozen normalisations."""
        self.model.train()
        for norm in self.norms:
            norm.eval()


@contextmanager
def freeze(model: nn.Module, trainable: Iterable[str]) -> Iterator[Frozen]:
    """Make only ``trainable`` trainable within the block; ``requires_grad`` is restored after it.

    A frozen batch norm is frozen completely: in training mode it would still collect running
    statistics and normalise by the batch, so use :meth:`Frozen.train` in place of
    ``model.train()``.

    Args:
        model: the network; changed in place and restored afterwards.
        trainable: names of tensors of the state dict (a norm is trained if any of its tensors
            is named), or of modules, which include all tensors inside.

    Raises:
        UserError: a name is unknown, or no parameter would be trained.
    """
    names = _tensors(model, trainable)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A tied parameter has several names, and any of them is enough.
    chosen = {id(parameter) for name, parameter in parameters.items() if name in names}
    if not chosen:
        raise UserError(
            f"trainable: {sorted(names)} names no parameter, so nothing would be trained; name a "
            f"layer with weights"
        )
    norms = tuple(
        module
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        and not any(name.rpartition(".")[0] == prefix for name in names)
    )
    before = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    trained = tuple(name for name, parameter in model.named_parameters() if id(parameter) in chosen)
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(id(parameter) in chosen)
        yield Frozen(model=model, trained=trained, norms=norms)
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _tensors(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the state-dict keys of ``names`` of tensors or modules."""
    keys = list(model.state_dict())
    modules = {name for name, _ in model.named_modules() if name}
    found: set[str] = set()
    for name in names:
        inside = {key for key in keys if key == name or key.startswith(f"{name}.")}
        if not inside and name not in modules:
            raise UserError(
                f"trainable: the model has no tensor or module '{name}'"
                f"{suggestion(name, [*keys, *modules])}"
            )
        found |= inside
    return found
