"""Layers, and the ledger that assigns every tensor of a network to one of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fusion.errors import UserError

Kind = Literal["conv", "conv_transpose", "linear"]

# a norm written by hand (FrozenBatchNorm2d, GlobalResponseNorm, RMSNorm) is known by its name
_NAME_OF_A_NORM = re.compile(r"norm([123]d)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear module with all tensors that are merged or permuted together with it.

    Attributes:
        name: dotted name of the module; the key of the weight where a plain parameter is used in
            ``F.conv2d`` or the like; ``""`` if the model itself is the layer.
        weight: state-dict key of the weight; under a parametrization, of its largest part.
        tensors: every state-dict key that belongs to the layer: weight, bias, affine parameters
            and running statistics of its norms, other parameters near it, further names of all
            these where they are tied.
        groups: groups of the convolution; 1 for a linear layer.
        kind: what the weight does.
        norms: dotted names of its normalisation modules, in the order in which they run.
        reached: whether the forward pass in evaluation mode runs it; an auxiliary classifier that
            only training uses is not reached.
    """

    name: str
    weight: str
    tensors: tuple[str, ...]
    groups: int
    kind: Kind
    norms: tuple[str, ...]
    reached: bool = True


@dataclass(frozen=True)
class Belongings:
    """State-dict keys that are assigned to a layer together, and the module that they form.

    Attributes:
        keys: the state-dict keys.
        norm: name of the normalisation module that they are, if they are one.
        layer: name of the convolution or linear module that a single tensor was taken from.
    """

    keys: tuple[str, ...]
    norm: str | None = None
    layer: str | None = None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution, transposed or not, or a linear map."""
    return isinstance(module, _ConvNd | nn.Linear)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: one of torch's norms, or one by its class's name."""
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm):
        return True
    named_so = _NAME_OF_A_NORM.search(type(module).__name__)
    return named_so is not None and next(module.children(), None) is None


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is taken whole: layers, norms, and torch's own modules with parameters."""
    if is_layer(module) or is_norm(module):
        return True
    container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn") and not container


class Ledger:
    """Ledger of layers, filled in the order of a forward pass.

    A tensor belongs to the layer that claims it first, under all its names at once. So tied
    modules and modules that run twice make one layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self._state = model.state_dict(keep_vars=True)
        self._under: dict[str, list[str]] = defaultdict(list)  # module name -> keys within it
        self._names: dict[int, list[str]] = defaultdict(list)  # id of a tensor -> its keys
        for key, value in self._state.items():
            self._names[id(value)].append(key)
            parts = key.split(".")
            for depth in range(len(parts)):
                self._under[".".join(parts[:depth])].append(key)
        self._drafts: list[_Draft] = []
        self._owner: dict[str, int] = {}

    def belongings(self, name: str) -> Belongings:
        """Return the tensors of a leaf module, or those of a container apart from its children."""
        keys = self._under.get(name, [])
        if not is_leaf(self.modules[name]):
            keys = [key for key in keys if key.rpartition(".")[0] == name]
        return Belongings(tuple(keys), name if is_norm(self.modules[name]) else None)

    def tensor(self, key: str) -> Belongings:
        """Return a single parameter or buffer; nothing if it is not part of the state dict."""
        if key not in self._state:
            return Belongings(())
        module = key.rpartition(".")[0]
        return Belongings((key,), layer=module if is_layer(self.modules[module]) else None)

    def layers_inside(self, name: str) -> list[str]:
        """Return the module itself if it is a layer, else the layers within, as registered."""
        if is_layer(self.modules[name]):
            return [name]
        prefix = f"{name}." if name else ""
        inside = (other for other in self.modules if other.startswith(prefix))
        return [other for other in inside if is_layer(self.modules[other])]

    def open(self, name: str) -> int:
        """Open the layer of a convolution or linear module; return its number.

        If its weight has an owner (tied, or run before), that layer receives the remaining tensors.
        """
        module = self.modules[name]
        keys = self._under[name]
        weight = f"{name}.weight" if name else "weight"
        if weight not in self._state:  # parametrized: the weight is computed from several tensors
            weight = self._largest(keys)
        kind: Kind = "conv" if isinstance(module, _ConvNd) else "linear"
        if isinstance(module, _ConvTransposeNd):
            kind = "conv_transpose"
        groups = module.groups if isinstance(module, _ConvNd) else 1
        return self._open(_Draft(name, weight, groups, kind), keys)

    def open_functional(self, weights: Iterable[str], kind: Kind, groups: int) -> int | None:
        """Open the layer of a functional call whose weight is computed from these tensors.

        Returns:
            its number; None where the weight comes from elsewhere (a hypernetwork, an argument).
        """
        keys = list(weights)
        if not keys:
            return None
        weight = self._largest(keys)
        return self._open(_Draft(weight, weight, groups, kind), keys)

    def give(self, number: int, belongings: Belongings) -> None:
        """Assign to a layer those of the tensors that have no owner yet."""
        draft = self._drafts[number]
        free = [key for key in belongings.keys if key not in self._owner]
        for key in free:
            for name in self._names[id(self._state[key])]:
                if name not in self._owner:
                    self._owner[name] = number
                    draft.tensors.append(name)
        # a norm without tensors has nothing to own, so it counts wherever it runs
        mine = bool(free) or not belongings.keys
        if mine and belongings.norm is not None and belongings.norm not in draft.norms:
            draft.norms.append(belongings.norm)

    def close(self) -> tuple[Layer, ...]:
        """Assign the tensors that the forward pass did not reach, and return all layers.

        A module that was not reached opens a new layer; any other tensor joins the one registered
        before it.

        Raises:
            UserError: if there is no layer.
        """
        reached = len(self._drafts)
        for name, module in self.modules.items():
            if is_layer(module) and not any(key in self._owner for key in self._under[name]):
                self.open(name)
        if not self._drafts:
            raise UserError(
                f"find_layers: {type(self.model).__name__} has no convolution or linear layer, "
                "and a network is scored, aligned and merged by these"
            )
        number = next((self._owner[key] for key in self._state if key in self._owner), 0)
        for key in self._state:
            if key not in self._owner:
                module_name = key.rpartition(".")[0]
                norm = module_name if is_norm(self.modules[module_name]) else None
                self.give(number, Belongings((key,), norm))
            number = self._owner[key]
        return tuple(
            Layer(
                name=draft.name,
                weight=draft.weight,
                tensors=tuple(draft.tensors),
                groups=draft.groups,
                kind=draft.kind,
                norms=tuple(draft.norms),
                reached=index < reached,
            )
            for index, draft in enumerate(self._drafts)
        )

    def _open(self, draft: _Draft, keys: Iterable[str]) -> int:
        number = self._owner.get(draft.weight)
        if number is None:
            number = len(self._drafts)
            self._drafts.append(draft)
            self.give(number, Belongings((draft.weight,)))  # first, so that it leads the list
        self.give(number, Belongings(tuple(keys)))
        return number

    def _largest(self, keys: Iterable[str]) -> str:
        def size(key: str) -> int:
            value = self._state[key]
            return value.numel() if isinstance(value, Tensor) else 0

        return max(keys, key=size)


@dataclass
class _Draft:
    """A layer under construction."""

    name: str
    weight: str
    groups: int
    kind: Kind
    tensors: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
